"""Expert kernel of plain PyTorch: one pair of matrix products for each slot that got tokens.

The default on CPUs, and on GPUs until a fused kernel is chosen; reads the counts on the host.
Legend: see moe/base.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import SlotWeights


def create() -> Experts:
    return Grouped()


class Grouped:
    """Pairs are already grouped by slot, so each slot's rows adjoin once gathered."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        counts = sent.count_S.tolist()
        total = sum(counts)
        x_MD = sent.x_ND.index_select(0, sent.row_M[:total])
        y_MD = torch.empty_like(x_MD)
        start = 0
        for slot, count in enumerate(counts):
            if count:
                end = start + count
                gate, up = F.linear(x_MD[start:end], weights.gate_up[slot]).chunk(2, dim=-1)
                torch.mm(F.silu(gate).mul_(up), weights.down[slot].t(), out=y_MD[start:end])
                start = end
        if takes == "pairs":
            return y_MD
        return sum_pairs(y_MD, sent).to(y_MD.dtype)
