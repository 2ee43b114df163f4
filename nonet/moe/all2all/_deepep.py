"""What the two adapters to DeepEP share: what it asks of a model, and its buffer.

Written to DeepEP's documented interface (deep_ep.Buffer, github.com/deepseek-ai/DeepEP, version 1.2) and tested with a
stand-in for it: it has not been run with DeepEP itself. Legend: see moe/base.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.errors import ConfigError
from nonet.moe.all2all._library import missing, needs_cuda
from nonet.moe.base import All2AllSpec, check_fp8

WIDTH = 128  # divides the width of the rows that its kernels move


def unavailable() -> str | None:
    return missing("deep_ep", "build it as github.com/deepseek-ai/DeepEP says")


def check(name: str, spec: All2AllSpec) -> None:
    """Raises ConfigError for what DeepEP does not do."""
    needs_cuda(name, spec)
    if spec.exact:
        raise ConfigError("combine", "exact", f"{name} adds up on the way; use another all2all_backend")
    if spec.dtype != torch.bfloat16:
        raise ConfigError("all2all_backend", name, f"moves bfloat16, not {str(spec.dtype).removeprefix('torch.')}")
    if spec.hidden_size % WIDTH:
        raise ConfigError("all2all_backend", name, f"needs a width that {WIDTH} divides, not {spec.hidden_size}")
    check_fp8(spec)


def open_buffer(spec: All2AllSpec, **sizes: Any) -> Any:
    """A `deep_ep.Buffer` over the group. Collective."""
    import deep_ep

    return deep_ep.Buffer(spec.group.process_group, explicitly_destroy=True, **sizes)


def never_none(x_TD: Tensor, id_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, or one row that goes nowhere: not every version of DeepEP takes a rank without tokens."""
    if len(x_TD):
        return x_TD.contiguous(), id_TK, weight_TK.contiguous()
    one = (0, 0, 0, 1)
    return F.pad(x_TD, one), F.pad(id_TK, one, value=-1), F.pad(weight_TK, one)
