"""Expert kernel for GPUs: two grouped products in Triton over the slots' addresses, nothing read on the host.

Takes experts that are silu(gate) * up between two plain products. Legend: see moe/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.errors import ConfigError
from nonet.kernels.triton import experts
from nonet.kernels.triton.experts import Tile
from nonet.moe.base import Dispatched, Experts, Takes
from nonet.weights.slots import SlotWeights


def create() -> Experts:
    return TritonExperts()


@dataclass(frozen=True, slots=True)
class _Addresses:
    weights: SlotWeights  # held, so that what is known of them stays true
    gate_up_S: Tensor
    down_S: Tensor


class TritonExperts:
    """Remembers each layer's addresses."""

    def __init__(self) -> None:
        self._known: dict[int, _Addresses] = {}

    def check(self, weights: SlotWeights) -> None:
        if not weights.plain:
            remedy = "has no biases, scales or other activations yet; use grouped"
            raise ConfigError("expert_backend", "triton", remedy)

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        x_ND, (two_I, D) = sent.x_ND, weights.gate_up[0].shape
        own = self._addresses(weights)
        first, second = tiles(len(sent.row_M) / len(weights.gate_up), x_ND.dtype)
        act_MI = experts.gate_up(x_ND, sent.row_M, sent.start_S, sent.count_S, own.gate_up_S, two_I // 2, first)
        y_MD = experts.down(act_MI, sent.start_S, sent.count_S, own.down_S, D, second)
        return y_MD if takes == "pairs" else experts.sum_pairs(y_MD, sent.pair_NK, sent.weight_M)

    def _addresses(self, weights: SlotWeights) -> _Addresses:
        known = self._known.get(id(weights))
        if known is None:
            self.check(weights)
            tables = (
                torch.tensor([w.data_ptr() for w in part], dtype=torch.int64, device=part[0].device)
                for part in (weights.gate_up, weights.down)
            )
            known = self._known[id(weights)] = _Addresses(weights, *tables)
        return known


def tiles(pairs_a_slot: float, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """For gate_up and down. The fastest of those tried on an H100 in bfloat16 at D 2048 and I 768; a rule, no table."""
    if dtype.itemsize > 2:
        few, many = Tile(16, 32, 32, 4, 3, True), Tile(64, 32, 32, 4, 3, False)
        return (few, few) if pairs_a_slot < 32 else (many, many)
    if pairs_a_slot < 8:
        return Tile(16, 64, 256, 4, 3, True), Tile(16, 128, 64 if pairs_a_slot < 1 else 128, 4, 4, True)
    if pairs_a_slot < 40:
        return Tile(32, 128, 128, 8, 3, True), Tile(32, 64, 128, 4, 4, True)
    if pairs_a_slot < 128:
        return Tile(128, 128, 64, 8, 4, False), Tile(64, 128, 64, 4, 3, False)
    return Tile(128, 128, 64, 8, 4, False), Tile(128, 256, 64, 8, 4, False)
