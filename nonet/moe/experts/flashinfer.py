"""Adapter to FlashInfer's fused MoE of CUTLASS kernels: both products, the activation and the weighted sum in a call.

Interface: flashinfer.fused_moe.cutlass_fused_moe, version 0.6.12, which compiles its kernels at first use, for many
minutes. It wants up above gate, so this holds a second copy of gate_up; nothing is read on the host, so it can be
captured. Needs slots that adjoin. Legend: see moe/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.moe.base import Dispatched, Experts, Takes
from nonet.weights.slots import SlotWeights

WIDTH = 8  # divides both widths: CUTLASS moves 16 bytes at once


def unavailable() -> str | None:
    return (
        None if find_spec("flashinfer") else "the module flashinfer is not installed; pip install 'nonet[flashinfer]'"
    )


def create() -> Experts:
    return FlashInfer()


@dataclass(frozen=True, slots=True)
class _Weights:
    of: SlotWeights  # held, so that what is known of them stays true
    up_gate_SID: Tensor
    down_SDI: Tensor


class FlashInfer:
    """Remembers each layer's gate_up the other way up."""

    def __init__(self) -> None:
        self._known: dict[int, _Weights] = {}

    def check(self, weights: SlotWeights) -> None:
        problem = _problem(weights)
        if problem:
            raise ConfigError("expert_backend", "flashinfer", f"{problem}; use triton")

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        from flashinfer.fused_moe import cutlass_fused_moe

        x_ND, S = sent.rows(), len(weights.gate_up)
        M = len(sent.row_M)
        if not (M and S):
            return x_ND.new_zeros((M if takes == "pairs" else len(x_ND), x_ND.shape[1]))
        own = self._turned(weights)
        pair_M = torch.arange(M, device=x_ND.device)
        slot_M = torch.searchsorted(torch.cumsum(sent.count_S, 0), pair_M, right=True)  # S past the pairs: nobody's
        if takes == "pairs":
            x_MD = x_ND.index_select(0, torch.where(slot_M < S, sent.row_M, 0))
            slot, weight = slot_M.unsqueeze(1), torch.ones((M, 1), device=x_ND.device)
        else:
            at_NK = sent.pair_NK.clamp(min=0)
            is_here = sent.pair_NK >= 0
            x_MD, slot = x_ND, torch.where(is_here, slot_M[at_NK], S)
            weight = torch.where(is_here, sent.weight_M[at_NK], 0)
        out = torch.empty_like(x_MD)
        cutlass_fused_moe(x_MD, slot.int(), weight, own.up_gate_SID, own.down_SDI, x_MD.dtype, [], output=out)
        return out

    def _turned(self, weights: SlotWeights) -> _Weights:
        known = self._known.get(id(weights))
        if known is None:
            self.check(weights)
            assert weights.stacked is not None
            gate, up = weights.stacked[0].chunk(2, dim=1)
            known = self._known[id(weights)] = _Weights(weights, torch.cat([up, gate], dim=1), weights.stacked[1])
        return known


def _problem(weights: SlotWeights) -> str:
    """Why these slots cannot be computed, or ""."""
    if not weights.plain:
        return "has no biases, scales or other activations yet"
    if not weights.gate_up:
        return ""
    if weights.stacked is None:
        return "needs slots that adjoin"
    first = weights.gate_up[0]
    if first.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(first.dtype).removeprefix('torch.')}"
    widths = first.shape[1], weights.down[0].shape[1]
    if any(width % WIDTH for width in widths):
        return f"needs widths that {WIDTH} divides, not {' and '.join(map(str, widths))}"
    return ""
