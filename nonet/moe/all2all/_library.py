"""Shared by the adapters to all-to-alls of other libraries: what is installed, and slots as such a library counts them.

These libraries divide "experts" evenly over ranks, while a rank here may have any number of slots: slot s of rank r is
their expert r * most + s, with `most` the slots of the rank that has most. Legend: see moe/base.py.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.kernels.fp8 import ROW_BLOCK
from nonet.moe.base import All2AllSpec


def missing(module: str, remedy: str) -> str | None:
    """Why an adapter cannot run here, or None."""
    return None if find_spec(module) else f"the module {module} is not installed; {remedy}"


def needs_cuda(name: str, spec: All2AllSpec) -> None:
    """Raises ConfigError on CPUs."""
    if spec.group.device.type != "cuda":
        raise ConfigError("all2all_backend", name, "moves GPU tensors; on CPUs use shm")


def row_bytes(spec: All2AllSpec) -> int:
    """Of a row that travels, with its factors."""
    D = spec.hidden_size
    return D + 4 * (D // ROW_BLOCK) if spec.fp8 else D * spec.dtype.itemsize


class EvenIds:
    """Slots as ids of a library that gives each rank `most` experts."""

    def __init__(self, spec: All2AllSpec, absent: int) -> None:
        """`absent` is the id that a slot -1 gets."""
        by_rank = spec.fleet.slots_by_rank
        self.most = max(by_rank)
        ids = [rank * self.most + place for rank, slots in enumerate(by_rank) for place in range(slots)]
        self._id_G1 = torch.tensor([*ids, absent], device=spec.group.device)  # -1 finds the last

    def __call__(self, slot_TK: Tensor) -> Tensor:
        """int64, in slot_TK's shape."""
        return self._id_G1[slot_TK]
