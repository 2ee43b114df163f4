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
from nonet.weights.slots import SlotWeights


def create() -> Experts:
    return Reference()


class Reference:
    """One matrix-vector product a pair."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        y_MD = torch.zeros((sent.row_M.shape[0], sent.x_ND.shape[1]), dtype=sent.x_ND.dtype, device=sent.x_ND.device)
        for slot, (start, count) in enumerate(zip(sent.start_S.tolist(), sent.count_S.tolist(), strict=True)):
            for pair in range(start, start + count):
                x_1D = sent.x_ND[sent.row_M[pair]].clone().unsqueeze(0)  # a copy: the same alignment for every row
                gate, up = F.linear(x_1D, weights.gate_up[slot]).chunk(2, dim=-1)
                y_MD[pair] = F.linear((F.silu(gate) * up).contiguous(), weights.down[slot])[0]
        if takes == "pairs":
            return y_MD
        return sum_pairs(y_MD, sent).to(y_MD.dtype)
