"""Expert kernel for CPUs: few rows a slot run as one batched product over all slots, many as a product a slot.

The default on CPUs. A step that decodes a handful of sequences hits most slots with a row or two each; then the cost
of a call outweighs its work, and one padded batch wins. Legend: see moe/base.py; C rows of a slot, padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.layers.linear import linear, weight_first
from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import SlotWeights

MOST_PADDED = 32  # rows a slot beyond which padding costs more than calls
CALL_SHARE = 3  # a product alone costs about this many times its share of a batch


def create() -> Experts:
    return Cpu()


class Cpu:
    """Chooses between the batch and the loop by the counts."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        counts = sent.count_S.tolist()
        hit = sum(count > 0 for count in counts)
        if weights.stacked is not None and 0 < max(counts) <= MOST_PADDED and hit * CALL_SHARE > len(counts):
            y_MD = _batched(sent, weights.stacked, counts)
        else:
            y_MD = _looped(sent, weights, counts)
        return y_MD if takes == "pairs" else sum_pairs(y_MD, sent).to(y_MD.dtype)


def _batched(sent: Dispatched, stacked: tuple[Tensor, Tensor], counts: list[int]) -> Tensor:
    """One product over all slots, each with C rows; the rows past a slot's count repeat another's and are dropped."""
    gate_up_SID, down_SDI = stacked
    total = sum(counts)
    C = 1 << (max(counts) - 1).bit_length()  # few different shapes: kernels are compiled by shape
    step_C = torch.arange(C)
    pair_SC = (sent.start_S.unsqueeze(1) + step_C).clamp(max=total - 1)
    row_SC = sent.row_M[:total].index_select(0, pair_SC.view(-1))
    x_SDC = sent.x_ND.index_select(0, row_SC).view(len(counts), C, -1).transpose(1, 2)
    gate, up = torch.bmm(gate_up_SID, x_SDC).chunk(2, dim=1)
    y_SDC = torch.bmm(down_SDI, F.silu(gate).mul_(up))
    place_M = (step_C < sent.count_S.unsqueeze(1)).view(-1).nonzero().squeeze(1)
    return y_SDC.transpose(1, 2).reshape(len(counts) * C, -1).index_select(0, place_M)


def _looped(sent: Dispatched, weights: SlotWeights, counts: list[int]) -> Tensor:
    """A product for each slot that has rows."""
    total, start = sum(counts), 0
    x_MD = sent.x_ND.index_select(0, sent.row_M[:total])
    y_MD = torch.empty_like(x_MD)
    left = weight_first(x_MD)
    for slot, count in enumerate(counts):
        if not count:
            continue
        end = start + count
        if left:  # keep the intermediate transposed: its halves adjoin, and it is the next product's right operand
            gate, up = linear(x_MD[start:end], weights.gate_up[slot]).t().chunk(2)
            y_MD[start:end] = torch.bmm(weights.down[slot].unsqueeze(0), F.silu(gate).mul_(up).unsqueeze(0))[0].t()
        else:
            gate, up = F.linear(x_MD[start:end], weights.gate_up[slot]).chunk(2, dim=1)
            torch.mm(F.silu(gate).mul_(up), weights.down[slot].t(), out=y_MD[start:end])
        start = end
    return y_MD
