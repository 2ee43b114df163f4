"""Expert kernel of plain PyTorch: two matrix products for each slot that got tokens, or two batches over all slots.

The default on CPUs, and on GPUs until a fused kernel is chosen; reads the counts on the host.
Legend: see moe/base.py; C rows of a slot, padded; P = S * C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels.linear import linear
from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import SlotWeights

MOST_PADDED = 32  # rows a slot beyond which padding costs more than calls


def create() -> Experts:
    return Grouped()


class Grouped:
    """Pairs are already grouped by slot, so each slot's rows adjoin once gathered."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        counts = sent.count_S.tolist()
        on_cpu = sent.x_ND.device.type == "cpu"
        if on_cpu and weights.stacked is not None and pays_to_batch(counts):
            y_MD = _batched(sent, weights.stacked, counts)
        else:
            y_MD = _looped(sent, weights, counts, bucket if on_cpu else int)
        if takes == "pairs":
            return y_MD
        return _sum_on_cpu(y_MD, sent) if on_cpu else sum_pairs(y_MD, sent).to(y_MD.dtype)


def pays_to_batch(counts: list[int]) -> bool:
    """Whether one padded product over all slots beats a product a slot, on CPUs: few rows each, and not too few slots.

    A call alone reads its weights slower than a batch does (measured: 1.4 times on one thread, 2 on two).
    """
    return 0 < max(counts, default=0) <= MOST_PADDED and 3 * sum(count > 0 for count in counts) > len(counts)


def _batched(sent: Dispatched, stacked: tuple[Tensor, Tensor], counts: list[int]) -> Tensor:
    """Every slot computes C rows, C the largest count rounded up; rows past a slot's own repeat others and are dropped.

    The weight stands on the left, where oneDNN reads it as it is.
    """
    total, S = sum(counts), len(counts)
    C = 1 << (max(counts) - 1).bit_length()  # few different shapes: kernels are compiled by shape
    step_C = torch.arange(C)
    pair_SC = (sent.start_S.unsqueeze(1) + step_C).clamp(max=total - 1)
    row_P = sent.row_M.index_select(0, pair_SC.view(-1))
    x_SDC = sent.x_ND.index_select(0, row_P).view(S, C, -1).transpose(1, 2)
    gate, up = torch.bmm(stacked[0], x_SDC).chunk(2, dim=1)
    y_SDC = torch.bmm(stacked[1], F.silu(gate).mul_(up))
    place_M = (step_C < sent.count_S.unsqueeze(1)).view(-1).nonzero().squeeze(1)
    return y_SDC.transpose(1, 2).reshape(S * C, -1).index_select(0, place_M)


def _looped(sent: Dispatched, weights: SlotWeights, counts: list[int], rows_for: Callable[[int], int]) -> Tensor:
    """A product for each slot with rows. Of the next slots' rows it may take a few too, which are dropped."""
    total = sum(counts)
    row_M = sent.row_M[:total]
    over = max((rows_for(count) - count for count in counts), default=0)  # no product reads further past the end
    x_MD = sent.x_ND.index_select(0, torch.cat([row_M, row_M[:1].expand(over)]) if over else row_M)
    y_MD = x_MD.new_empty((total, x_MD.shape[1]))
    start = 0
    for slot, count in enumerate(counts):
        if count:
            x = x_MD[start : start + rows_for(count)]
            gate, up = linear(x, weights.gate_up[slot]).chunk(2, dim=-1)
            y_MD[start : start + count] = linear(F.silu(gate).mul_(up), weights.down[slot])[:count]
            start += count
    return y_MD


def bucket(count: int) -> int:
    """The count rounded up to one of four sizes an octave: at most a quarter more, and few shapes."""
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
