"""Expert kernel for GPUs: two grouped products in Triton over the slots' addresses, nothing read on the host.

Weights in FP8 are multiplied as they are, by rows quantised likewise (`kernels.triton.experts_fp8`). Tiles come from a
table of what was measured on this device, else from a rule. Legend: see moe/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.kernels.fp8 import FP8
from nonet.kernels.triton import INTERPRETED, experts, experts_fp8, tuned
from nonet.kernels.triton.tiling import Tile
from nonet.moe.base import Dispatched, Experts, Takes
from nonet.weights.slots import SlotWeights

ALIGNED = 16  # bytes: the kernels read so many at once
SHARED = 232448  # bytes that the largest tiles take


def create() -> Experts:
    return TritonExperts()


@dataclass(frozen=True, slots=True)
class _Addresses:
    """int64 tables of a layer's slots, on the device."""

    weights: SlotWeights  # held, so that what is known of them stays true
    gate_up_S: Tensor
    down_S: Tensor
    gate_up_bias_S: Tensor | None
    down_bias_S: Tensor | None
    gate_up_scale_S: Tensor | None
    down_scale_S: Tensor | None
    tuned: tuned.Layer | None


class TritonExperts:
    """Remembers each layer's addresses. tables: tiles to use instead of those that were measured on this device."""

    def __init__(self, tables: tuple[tuned.Layer, ...] | None = None) -> None:
        self._known: dict[int, _Addresses] = {}
        self._tables = tables

    def check(self, weights: SlotWeights) -> None:
        if weights.gate_up:
            self._addresses(weights)  # kept from now on: a step that is captured could not copy them

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        if not weights.gate_up:
            rows = len(sent.row_M) if takes == "pairs" else len(sent.x_ND)
            return sent.x_ND.new_zeros((rows, sent.x_ND.shape[1]), dtype=sent.dtype)
        own = self._addresses(weights)
        y_MD = self._plain(sent.plain(), own) if weights.scales is None else self._fp8(sent, own)
        return y_MD if takes == "pairs" else experts.sum_pairs(y_MD, sent.pair_NK, sent.weight_M, sent.out)

    def _plain(self, sent: Dispatched, own: _Addresses) -> Tensor:
        x_ND, width = sent.x_ND, own.weights.down[0].shape[1]
        first, second = self._tiles(sent, own)
        where, clamped = (sent.start_S, sent.count_S), own.weights.activation == "clamped"
        act_MI = experts.gate_up(x_ND, sent.row_M, *where, own.gate_up_S, width, first, own.gate_up_bias_S, clamped)
        return experts.down(act_MI, *where, own.down_S, x_ND.shape[1], second, own.down_bias_S)

    def _fp8(self, sent: Dispatched, own: _Addresses) -> Tensor:
        D, width = own.weights.down[0].shape
        first, second = self._tiles(sent, own)
        where, scales = (sent.start_S, sent.count_S), (own.gate_up_scale_S, own.down_scale_S)
        assert scales[0] is not None
        assert scales[1] is not None
        rows = experts_fp8.quantize_rows(sent.x_ND) if sent.scale_Nd is None else (sent.x_ND, sent.scale_Nd)
        act = experts_fp8.gate_up(*rows, sent.row_M, *where, own.gate_up_S, scales[0], width, first)
        return experts_fp8.down(*act, *where, own.down_S, scales[1], D, second, sent.dtype)

    def _tiles(self, sent: Dispatched, own: _Addresses) -> tuple[Tile, Tile]:
        pairs_a_slot = len(sent.row_M) / len(own.weights.gate_up)
        if own.tuned is None:
            return tiles(pairs_a_slot, own.weights.gate_up[0].dtype)
        bucket = own.tuned.nearest(pairs_a_slot)
        return bucket.gate_up, bucket.down

    def _addresses(self, weights: SlotWeights) -> _Addresses:
        known = self._known.get(id(weights))
        if known is None:
            reason = _problem(weights)
            if reason:
                raise ConfigError("expert_backend", "triton", f"{reason}; use grouped")
            scales = weights.scales
            known = self._known[id(weights)] = _Addresses(
                weights,
                gate_up_S=_addresses(weights.gate_up),
                down_S=_addresses(weights.down),
                gate_up_bias_S=_table(weights.gate_up_bias),
                down_bias_S=_table(weights.down_bias),
                gate_up_scale_S=_table(scales.gate_up if scales else None),
                down_scale_S=_table(scales.down if scales else None),
                tuned=self._tuned(weights),
            )
        return known

    def _tuned(self, weights: SlotWeights) -> tuned.Layer | None:
        gate_up, (D, width) = weights.gate_up[0], weights.down[0].shape
        if self._tables is None:
            self._tables = () if INTERPRETED else tuned.load(torch.cuda.get_device_name(gate_up.device))
        return tuned.find(self._tables, len(weights.gate_up), D, width, str(gate_up.dtype).removeprefix("torch."))


def _problem(weights: SlotWeights) -> str:
    """Why these slots cannot be computed, or ""."""
    scales, matrices = weights.scales, (*weights.gate_up, *weights.down)
    biases = (*(weights.gate_up_bias or ()), *(weights.down_bias or ()))
    factors = () if scales is None else (*scales.gate_up, *scales.down)
    if scales is not None and (scales.block != experts_fp8.BLOCK or scales.offset):
        return f"takes FP8 weights in blocks of {experts_fp8.BLOCK} that slices do not cut"
    if scales is not None and (biases or weights.activation != "silu"):
        return "takes no biases or other activations beside FP8 weights"
    if not INTERPRETED:
        if any(w.device.type != "cuda" for w in matrices):
            return "runs on GPUs"
        gpu = torch.cuda.get_device_properties(matrices[0].device)
        if getattr(gpu, "shared_memory_per_block_optin", SHARED) < SHARED:
            return f"has tiles for GPUs with {SHARED >> 10} KiB of shared memory a program, as Hopper's"
    if any(w.data_ptr() % ALIGNED for w in matrices) or not all(t.is_contiguous() for t in matrices + biases + factors):
        return f"wants each slot's tensors contiguous, its weights from a multiple of {ALIGNED} bytes on"
    if any(b.dtype != matrices[0].dtype for b in biases) or any(f.dtype != torch.float32 for f in factors):
        return "wants biases of the weights' dtype and factors in float32"
    return ""


def _addresses(part: tuple[Tensor, ...]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in part], dtype=torch.int64, device=part[0].device)


def _table(part: tuple[Tensor, ...] | None) -> Tensor | None:
    return None if part is None else _addresses(part)


def tiles(pairs_a_slot: float, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """For gate_up and down, where no table knows better. The fastest of those tried on an H100 at D 2048 and I 768."""
    if dtype.itemsize > 2:
        few, many = Tile(16, 32, 32, 4, 3, True), Tile(64, 32, 32, 4, 3, False)
        return (few, few) if pairs_a_slot < 32 else (many, many)
    if dtype == FP8:
        if pairs_a_slot < 64:
            BM = 16 if pairs_a_slot < 8 else 32
            return Tile(BM, 128, 128, 4, 6, True), Tile(BM, 128, 128, 4, 3, True)
        return Tile(128, 128, 128, 8, 3, False, 1), Tile(128, 256, 128, 8, 3, False, 1)
    if pairs_a_slot < 8:
        return Tile(16, 64, 256, 4, 3, True), Tile(16, 128, 64 if pairs_a_slot < 1 else 128, 4, 4, True)
    if pairs_a_slot < 40:
        return Tile(32, 128, 128, 8, 3, True), Tile(32, 64, 128, 4, 4, True)
    if pairs_a_slot < 128:
        return Tile(128, 128, 64, 8, 4, False, halve=True), Tile(64, 128, 64, 4, 3, False)
    return Tile(128, 128, 64, 8, 4, False, halve=True), Tile(128, 256, 64, 8, 4, False, halve=True)
