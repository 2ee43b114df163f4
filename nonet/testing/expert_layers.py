"""Expert layers of known models as one rank has them, and tokens for these: what tiles are tuned for and measured with.

Used by tools/tune_experts.py and benchmarks/gpu_experts.py. Legend: see moe/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.kernels.fp8 import FP8

Given = tuple[Tensor, Tensor, Tensor]  # rows, slots, weights


@dataclass(frozen=True, slots=True)
class Shape:
    """Experts of one layer on one rank: the first `slots` of `experts`. dtype: of their weights."""

    experts: int
    slots: int
    hidden: int
    width: int
    top_k: int
    dtype: torch.dtype
    tokens: tuple[int, ...]  # how many are tried

    @property
    def fp8(self) -> bool:
        return self.dtype == FP8


_TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 8192)
SHAPES = {
    "qwen3-bf16": Shape(128, 128, 2048, 768, 8, torch.bfloat16, _TOKENS),
    "qwen3-fp8": Shape(128, 128, 2048, 768, 8, FP8, _TOKENS),
    "deepseek-fp8": Shape(256, 32, 7168, 2048, 8, FP8, (32, 128, 1024, 8192, 32768)),
    "mixtral-bf16": Shape(8, 8, 4096, 14336, 2, torch.bfloat16, (1, 8, 32, 128, 256, 512, 4096)),
}


def routed(shape: Shape, tokens: int, device: str) -> Given:
    """(bfloat16 x_ND, slot_NK, weight_NK): each token's experts at random; rows with none of the slots do not come."""
    slot_TK = torch.rand((tokens, shape.experts), device=device).topk(shape.top_k, 1).indices
    slot_TK = torch.where(slot_TK < shape.slots, slot_TK, -1)
    slot_NK = slot_TK[(slot_TK >= 0).any(1)]
    x_ND = torch.randn((len(slot_NK), shape.hidden), device=device, dtype=torch.bfloat16)
    return x_ND, slot_NK, torch.rand(slot_NK.shape, device=device)
