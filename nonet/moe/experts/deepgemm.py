"""Adapter to DeepGEMM's grouped products for Hopper GPUs and later: bfloat16, or FP8 in blocks of 128 x 128.

DeepGEMM (github.com/deepseek-ai/DeepGEMM; installed as sgl-deep-gemm 0.1.4) takes each slot's rows in aligned blocks,
which our kernels lay out and activate; only sizes are read on the host, so it can be captured. It compiles a kernel, in
seconds, for each shape it has not seen: warm up before measuring or capturing. Needs slots that adjoin.
Legend: see moe/base.py; A aligned places (kernels/triton/aligned).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.kernels.fp8 import FP8, ROW_BLOCK
from nonet.moe.base import Dispatched, Experts, Takes
from nonet.weights.slots import SlotWeights

WIDTH = 64  # divides both widths of experts in bfloat16


def unavailable() -> str | None:
    return None if find_spec("deep_gemm") else "the module deep_gemm is not installed; pip install 'nonet[deepgemm]'"


def create() -> Experts:
    return DeepGemm()


@dataclass(frozen=True, slots=True)
class _Weights:
    of: SlotWeights  # held, so that what is known of them stays true
    gate_up: Any  # [S, 2I, D], or that with its factors [S, 2i, d]
    down: Any


class DeepGemm:
    """Remembers each layer's factors as DeepGEMM wants them."""

    def __init__(self) -> None:
        self._known: dict[int, _Weights] = {}

    def check(self, weights: SlotWeights) -> None:
        problem = _problem(weights)
        if problem:
            raise ConfigError("expert_backend", "deepgemm", f"{problem}; use triton")

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        from nonet.kernels.triton import aligned, experts, experts_fp8

        N, M, D, in_fp8 = len(sent.x_ND), len(sent.row_M), sent.x_ND.shape[1], weights.scales is not None
        if not (M and weights.gate_up):
            return sent.x_ND.new_zeros((M if takes == "pairs" else N, D), dtype=sent.dtype)
        own, dtype = self._laid(weights), sent.dtype
        x_ND, scale_Nd = (sent.x_ND, sent.scale_Nd) if in_fp8 else (sent.rows(), None)
        if in_fp8 and scale_Nd is None:
            x_ND, scale_Nd = experts_fp8.quantize_rows(x_ND)
        align = alignment(M / len(weights.gate_up))
        laid = aligned.lay(x_ND, scale_Nd, sent.row_M, sent.weight_M, sent.start_S, sent.count_S, align)
        both_A2I = _product(laid.x_AD, laid.scale_Ad, own.gate_up, laid.slot_A, align, dtype)
        act_AI, scale_Ai = aligned.activate(both_A2I, laid.slot_A, to_fp8=in_fp8)
        y_AD = _product(act_AI, scale_Ai, own.down, laid.slot_A, align, dtype)
        if takes == "pairs":
            return y_AD.index_select(0, laid.place_M)
        pair_NK = sent.pair_NK
        place_NK = torch.where(pair_NK >= 0, laid.place_M[pair_NK.clamp(min=0)], -1)
        return experts.sum_pairs(y_AD, place_NK, laid.weight_A)

    def _laid(self, weights: SlotWeights) -> _Weights:
        known = self._known.get(id(weights))
        if known is None:
            self.check(weights)
            assert weights.stacked is not None
            gate_up, down, scales = *weights.stacked, weights.scales
            if scales is None:
                known = _Weights(weights, gate_up, down)
            else:
                factors = torch.stack([scale_2id.flatten(0, 1) for scale_2id in scales.gate_up])
                known = _Weights(weights, (gate_up, factors), (down, torch.stack(scales.down)))
            self._known[id(weights)] = known
        return known


def alignment(pairs_a_slot: float) -> int:
    """Places of a block: as tall as the tiles that so many rows want."""
    return 32 if pairs_a_slot < 32 else 64 if pairs_a_slot < 64 else 128


def _product(
    x_AD: Tensor, scale_Ad: Tensor | None, weight: Any, slot_A: Tensor, align: int, dtype: torch.dtype
) -> Tensor:
    """[A, rows of a weight]: each block by its slot's weight; nobody's blocks are undefined."""
    import deep_gemm

    rows = (weight if scale_Ad is None else weight[0]).shape[1]
    out = torch.empty((len(x_AD), rows), dtype=dtype, device=x_AD.device)
    deep_gemm.utils.layout.set_mk_alignment_for_contiguous_layout(align)  # its own state, so it is said each time
    if scale_Ad is None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x_AD, weight, out, slot_A)
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x_AD, scale_Ad), weight, out, slot_A)
    return out


def _problem(weights: SlotWeights) -> str:
    """Why these slots cannot be computed, or ""."""
    if weights.gate_up_bias is not None or weights.activation != "silu":
        return "has no biases or other activations"
    if not weights.gate_up:
        return ""
    first, scales = weights.gate_up[0], weights.scales
    if weights.stacked is None:
        return "needs slots that adjoin"
    if first.dtype not in (torch.bfloat16, FP8):
        return f"computes in bfloat16 or FP8, not {str(first.dtype).removeprefix('torch.')}"
    if scales is not None and (scales.block != ROW_BLOCK or scales.offset):
        return f"takes FP8 in whole blocks of {ROW_BLOCK}"
    widths, step = (first.shape[1], weights.down[0].shape[1]), WIDTH if scales is None else ROW_BLOCK
    if any(width % step for width in widths):
        return f"needs widths that {step} divides, not {' and '.join(map(str, widths))}"
    if first.is_cuda:
        generation = torch.cuda.get_device_capability(first.device)[0]
        if generation < 9:
            return "needs a Hopper GPU or a later one"
        if generation > 9 and scales is not None:  # there factors must be powers of two, which these are not
            return "takes FP8 on Hopper GPUs alone"
    return ""
