"""Expert kernel of plain PyTorch: two matrix products for each slot that got tokens.

The default on CPUs, and on GPUs until a fused kernel is chosen; reads the counts on the host. On CPUs few rows a slot
take other ways to the same products: one batch over all slots, or with very few a compiled kernel. Weights in FP8
become numbers of the model's type at use, a slot at a time; biases and other activations take the plain way too.
Legend: see moe/base.py; C rows of a slot, padded.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels import cpu
from nonet.moe.base import Dispatched, Experts, Takes, sum_pairs
from nonet.moe.experts.reference import activate
from nonet.weights.slots import SlotWeights

MOST_PADDED = 96  # rows a slot beyond which a product for each slot is as fast


def create() -> Experts:
    return Grouped()


class Grouped:
    """Pairs are already grouped by slot, so each slot's rows adjoin once gathered."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1) if torch.get_num_threads() > 1 else None  # beside this thread, on CPUs

    def check(self, weights: SlotWeights) -> None:
        """All kinds."""

    def __call__(self, sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        sent = sent.plain()
        counts = sent.count_S.tolist()
        if not cpu.handles(sent.x_ND) or weights.gate_up_bias is not None or weights.activation != "silu":
            y_MD = _each(sent, weights, counts)
            return y_MD if takes == "pairs" else sum_pairs(y_MD, sent).to(y_MD.dtype)
        from nonet.kernels.cpu import rows

        y_MD = _on_cpu(sent, weights, counts, self._pool)
        return y_MD if takes == "pairs" else rows.sum_pairs(y_MD, sent.pair_NK, sent.weight_M)


def _each(sent: Dispatched, weights: SlotWeights, counts: list[int]) -> Tensor:
    """[sum of counts, D]: the specification's products, once for all rows of a slot."""
    x_MD = sent.x_ND.index_select(0, sent.row_M[: sum(counts)])
    y_MD = torch.empty_like(x_MD)
    start = 0
    for slot, count in enumerate(counts):
        if count:
            own = slice(start, start + count)
            gate_up, down = weights.matrices(slot, x_MD.dtype)
            gate_up_bias, down_bias = weights.biases(slot)
            act_CI = activate(F.linear(x_MD[own], gate_up, gate_up_bias), weights.activation)
            y_MD[own] = F.linear(act_CI, down, down_bias)
            start += count
    return y_MD


# -- on CPUs: other ways to the same products. The weight stands on the left, where oneDNN reads it as it is --------


def _on_cpu(sent: Dispatched, weights: SlotWeights, counts: list[int], pool: ThreadPoolExecutor | None) -> Tensor:
    """[sum of counts, D], by the way that is fastest for so many rows a slot (measured)."""
    from nonet.kernels.cpu import experts

    total, C = sum(counts), bucket(max(counts, default=0))
    if weights.stacked is not None and weights.scales is None and total:
        if experts.handles(total, weights.stacked):
            where = sent.row_M, sent.start_S, sent.count_S
            return experts.run_experts(sent.x_ND, *where, weights.stacked, counts, pool)
        if C <= MOST_PADDED and C * len(counts) <= 4 * total:  # a batch computes C rows of every slot
            return _batched(sent, weights.stacked, total, C)
    return _each_on_cpu(sent, weights, counts)


def _batched(sent: Dispatched, stacked: tuple[Tensor, Tensor], total: int, C: int) -> Tensor:
    """Every slot computes C rows; those past a slot's own are dropped."""
    from nonet.kernels.cpu import experts, rows

    x_SCD = rows.pad(sent.x_ND, sent.row_M, sent.start_S, sent.count_S, C)
    act_SIC = experts.silu_and_multiply(torch.bmm(stacked[0], x_SCD.transpose(1, 2)))
    y_MD = x_SCD.new_empty((total, x_SCD.shape[2]))
    rows.collect(torch.bmm(stacked[1], act_SIC), sent.start_S, sent.count_S, y_MD)
    return y_MD


def _each_on_cpu(sent: Dispatched, weights: SlotWeights, counts: list[int]) -> Tensor:
    """As `_each`; of the next slots' rows a product may take a few too, which are dropped."""
    from nonet.kernels.cpu import experts, rows

    total = sum(counts)
    row_M = sent.row_M[:total]
    over = max((bucket(count) - count for count in counts), default=0)  # no product reads further past the end
    x_MD = sent.x_ND.index_select(0, torch.cat([row_M, row_M[:1].expand(over)]) if over else row_M)
    y_MD = x_MD.new_empty((total, x_MD.shape[1]))
    start = 0
    for slot, count in enumerate(counts):
        if count:
            x_CD = x_MD[start : start + bucket(count)]
            gate_up, down = weights.matrices(slot, x_MD.dtype)
            act_1IC = experts.silu_and_multiply(torch.mm(gate_up, x_CD.t()).unsqueeze(0))
            y_1DC = torch.mm(down, act_1IC[0]).unsqueeze(0)
            rows.collect(y_1DC, sent.start_S[slot : slot + 1], sent.count_S[slot : slot + 1], y_MD)
            start += count
    return y_MD


def bucket(count: int) -> int:
    """The count rounded up to one of four sizes an octave: at most a quarter more, and few shapes to compile for."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step
