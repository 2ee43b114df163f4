"""The specification of an expert kernel, and the expert half of `combine: exact`.

Each pair is computed by itself with the same calls on the same shapes, so a row's bits do not depend on how many
rows share its expert, where the expert lives, or which backend brought the row. Slow on purpose.
Legend: see moe/base.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import Activation, SlotWeights

ALPHA, LIMIT = 1.702, 7.0  # of the clamped activation, as gpt-oss has them


def create() -> Experts:
    return Reference()


class Reference:
    """Matrix-vector products, a pair at a time."""

    def check(self, weights: SlotWeights) -> None:
        """All kinds."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        sent = sent.plain()
        y_MD = torch.zeros((sent.row_M.shape[0], sent.x_ND.shape[1]), dtype=sent.x_ND.dtype, device=sent.x_ND.device)
        for slot, (start, count) in enumerate(zip(sent.start_S.tolist(), sent.count_S.tolist(), strict=True)):
            if not count:
                continue
            gate_up, down = weights.matrices(slot, sent.x_ND.dtype)
            gate_up_bias, down_bias = weights.biases(slot)
            for pair in range(start, start + count):
                x_1D = sent.x_ND[sent.row_M[pair]].clone().unsqueeze(0)  # a copy: the same alignment for every row
                act_1I = activate(F.linear(x_1D, gate_up, gate_up_bias), weights.activation)
                y_MD[pair] = F.linear(act_1I.contiguous(), down, down_bias)[0]
        if takes == "pairs":
            return y_MD
        return sum_pairs(y_MD, sent).to(y_MD.dtype)


def activate(both_C2I: Tensor, activation: Activation) -> Tensor:
    """[C, I] of gate beside up, [C, 2I]."""
    gate, up = both_C2I.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    gate = gate.clamp(max=LIMIT)
    return (up.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(gate * ALPHA))
