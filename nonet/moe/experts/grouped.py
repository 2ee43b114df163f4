"""Expert kernel of plain PyTorch: two matrix products for each slot that got tokens.

The default on CPUs, and on GPUs until a fused kernel is chosen; reads the counts on the host. On CPUs few rows a slot
take other ways to the same products: one batch over all slots, or with very few a compiled kernel.
Legend: see moe/base.py; C rows of a slot, padded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels import cpu
from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.weights.slots import SlotWeights

MOST_PADDED = 32  # rows a slot beyond which padding costs more than calls


def create() -> Experts:
    return Grouped()


class Grouped:
    """Pairs are already grouped by slot, so each slot's rows adjoin once gathered."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        counts = sent.count_S.tolist()
        if not cpu.handles(sent.x_ND):
            y_MD = _looped(sent, weights, counts, int, silu_and_multiply)
            return y_MD if takes == "pairs" else sum_pairs(y_MD, sent).to(y_MD.dtype)
        from nonet.kernels.cpu import rows

        y_MD = _on_cpu(sent, weights, counts)
        return y_MD if takes == "pairs" else rows.sum_pairs(y_MD, sent.pair_NK, sent.weight_M, y_MD.dtype)


def silu_and_multiply(both_M2I: Tensor) -> Tensor:
    """[M, I]: silu(gate) * up, of gate beside up."""
    gate, up = both_M2I.chunk(2, dim=-1)
    return F.silu(gate) * up


def _looped(
    sent: Dispatched,
    weights: SlotWeights,
    counts: list[int],
    rows_for: Callable[[int], int],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """[sum of counts, D]: two products for each slot with rows, of `rows_for` of them.

    Those too many belong to the next slots, whose own products come later and write over them.
    """
    total = sum(counts)
    if not total:
        return sent.x_ND[:0]
    row_M = sent.row_M[:total]
    over = max((rows_for(count) - count for count in counts), default=0)  # no product reaches further past the end
    x_MD = sent.x_ND.index_select(0, torch.cat([row_M, row_M[:1].expand(over)]) if over else row_M)
    spans, start = [], 0
    for count in counts:
        spans.append(slice(start, start + rows_for(count)))
        start += count
    both_M2I = x_MD.new_empty((total + over, 2 * weights.down[0].shape[1]))
    for span, count, weight in zip(spans, counts, weights.gate_up, strict=True):
        if count:
            torch.mm(x_MD[span], weight.t(), out=both_M2I[span])
    act_MI, y_MD = activate(both_M2I), torch.empty_like(x_MD)
    for span, count, weight in zip(spans, counts, weights.down, strict=True):
        if count:
            torch.mm(act_MI[span], weight.t(), out=y_MD[span])
    return y_MD[:total]


# -- on CPUs: other ways to the same products, where a slot has few rows ------------------------------------------


def _on_cpu(sent: Dispatched, weights: SlotWeights, counts: list[int]) -> Tensor:
    """[sum of counts, D], by the way that is fastest for so many rows a slot (measured)."""
    from nonet.kernels.cpu import experts

    if weights.stacked is not None and 0 < max(counts, default=0) <= MOST_PADDED:
        if sum(counts) <= len(counts):
            where = sent.row_M, sent.start_S, sent.count_S
            return experts.run_experts(sent.x_ND, *where, *weights.stacked, sum(counts))
        if 3 * sum(count > 0 for count in counts) > len(counts):  # a batch reads the weights of all slots
            return _batched(sent, weights.stacked, counts)
    return _looped(sent, weights, counts, bucket, experts.silu_and_multiply)


def _batched(sent: Dispatched, stacked: tuple[Tensor, Tensor], counts: list[int]) -> Tensor:
    """Every slot computes C rows, C the largest count rounded up; those past a slot's own are dropped.

    The weight stands on the left, where oneDNN reads it as it is.
    """
    from nonet.kernels.cpu import experts, rows

    C = 1 << (max(counts) - 1).bit_length()  # few different shapes: products are compiled by shape
    x_SCD = rows.pad(sent.x_ND, sent.row_M, sent.start_S, sent.count_S, C)
    act_SIC = experts.silu_and_multiply(torch.bmm(stacked[0], x_SCD.transpose(1, 2)))
    return rows.collect(torch.bmm(stacked[1], act_SIC), sent.start_S, sent.count_S, sum(counts))


def bucket(count: int) -> int:
    """The count rounded up to one of four sizes an octave: at most a quarter more, and few shapes."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step
