"""Expert kernel of plain PyTorch: two matrix products for each slot that got tokens.

The default on CPUs, and on GPUs until a fused kernel is chosen; reads the counts on the host.
Legend: see moe/base.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels.linear import linear
from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import SlotWeights


def create() -> Experts:
    return Grouped()


class Grouped:
    """Pairs are already grouped by slot, so each slot's rows adjoin once gathered.

    On CPUs a product takes a few of the next slot's rows too and drops them, since kernels are compiled by shape.
    """

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        counts = sent.count_S.tolist()
        total = sum(counts)
        buckets = [bucket(count) for count in counts] if sent.x_ND.device.type == "cpu" else counts
        row_M = sent.row_M[:total]
        over = max(buckets, default=0) - 1  # no product reads further past the end
        x_MD = sent.x_ND.index_select(0, torch.cat([row_M, row_M[:1].expand(over)]) if over > 0 else row_M)
        y_MD = x_MD.new_empty((total, x_MD.shape[1]))
        start = 0
        for slot, (count, rows) in enumerate(zip(counts, buckets, strict=True)):
            if count:
                gate, up = linear(x_MD[start : start + rows], weights.gate_up[slot]).chunk(2, dim=-1)
                y = linear(F.silu(gate).mul_(up), weights.down[slot])
                y_MD[start : start + count] = y[:count]
                start += count
        if takes == "pairs":
            return y_MD
        return _sum_on_cpu(y_MD, sent) if y_MD.device.type == "cpu" else sum_pairs(y_MD, sent).to(y_MD.dtype)


def bucket(count: int) -> int:
    """The count rounded up to one of four sizes an octave: at most a fifth more, and few shapes."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def _sum_on_cpu(y_MD: Tensor, sent: Dispatched) -> Tensor:
    """[N, D]: `sum_pairs` as one call, a bag of pairs for each row; adds in float32 in k order."""
    N, K = sent.pair_NK.shape
    if y_MD.shape[0] == N * K:  # every slot is here
        pair = sent.pair_NK
        return F.embedding_bag(pair, y_MD, per_sample_weights=_weights(y_MD, sent, pair), mode="sum")
    here_NK = sent.pair_NK >= 0
    count_N = here_NK.sum(dim=1)
    pair = sent.pair_NK[here_NK]
    return F.embedding_bag(
        pair, y_MD, torch.cumsum(count_N, 0) - count_N, per_sample_weights=_weights(y_MD, sent, pair), mode="sum"
    )


def _weights(y_MD: Tensor, sent: Dispatched, pair: Tensor) -> Tensor:
    return sent.weight_M[pair].to(y_MD.dtype)
