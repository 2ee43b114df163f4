"""Another GPU's memory: windows of symmetric memory among the ranks of one NVLink domain.

The counterpart of `peer.Windows`, with the same `tensor`; `open_windows` gives whichever the group's device has. Used
by the one-sided all-to-alls. The memory is PyTorch's (torch.distributed._symmetric_memory) and goes with the object.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nonet.comm.group import Group
from nonet.comm.peer import Windows
from nonet.errors import CommError


class SymmetricWindows:
    """`nbytes` of GPU memory on every rank of a group, zeros, each mapped by all of them.

    Collective. Raises CommError if the GPUs cannot reach each other's memory.
    """

    def __init__(self, group: Group, nbytes: int) -> None:
        if group.size == 1:
            self._bytes = [torch.zeros(nbytes, dtype=torch.uint8, device=group.device)]
            return
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here multicasts
        from torch.distributed import _symmetric_memory as symmetric

        own = self._all_or_none(group, lambda: symmetric.empty(nbytes, dtype=torch.uint8, device=group.device).zero_())
        handle = self._all_or_none(group, lambda: symmetric.rendezvous(own, group.process_group))
        self._handle = handle  # the mappings live as long
        self._bytes = [handle.get_buffer(r, (nbytes,), torch.uint8, 0) for r in range(group.size)]
        torch.cuda.synchronize(group.device)
        group.barrier()  # everyone's zeros are written

    @staticmethod
    def _all_or_none(group: Group, work: Callable[[], Any]) -> Any:
        """The result of work, or CommError on every rank that says which one failed and why."""
        result, error = None, ""
        try:
            result = work()
        except (RuntimeError, AttributeError) as failed:
            error = str(failed).splitlines()[0]
        for rank, said in zip(group.ranks, group.all_gather_object(error), strict=True):
            if said:
                raise CommError(f"no memory shared among the GPUs of ranks {group.ranks}: rank {rank} says: {said}")
        return result

    def tensor(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor over rank `rank`'s window from byte `offset` (a multiple of 64)."""
        assert offset % 64 == 0, "tensors in a window start on a cache line"
        return self._bytes[rank][offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def open_windows(group: Group, nbytes: int) -> SymmetricWindows | Windows:
    """Symmetric memory among GPUs, POSIX shared memory among CPU ranks of one host. Collective."""
    return SymmetricWindows(group, nbytes) if group.device.type == "cuda" else Windows(group, nbytes)
