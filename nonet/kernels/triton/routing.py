"""Choosing experts: scores, groups, the K best, their weights, in one pass. Specified by `moe.router`.

A program has a row, and takes the best score K times; of equal ones the lower expert or group.
Legend: T tokens, E experts, K top-k, G groups of experts, e experts of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before

WARPS = 1  # of a row: sums over one warp need no shared memory


def topk(
    logits_TE: Tensor,
    top_k: int,
    *,
    sigmoid: bool = False,
    bias_E: Tensor | None = None,
    groups: tuple[int, int, int] = (1, 1, 1),
    renormalise: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(expert_TK int64, weight_TK float32), best first. groups: how many there are, how many are kept, and how many of
    a group's best scores are added to compare it with others."""
    T, E = logits_TE.shape
    expert = torch.empty((T, top_k), dtype=torch.int64, device=logits_TE.device)
    weight = torch.empty((T, top_k), dtype=torch.float32, device=logits_TE.device)
    count, kept, best = groups
    if T:
        _topk[(T,)](
            logits_TE.contiguous(), bias_E, expert, weight, E, float(scale), K=top_k, G=count, e=E // count, KEPT=kept,
            BEST=best, SIGMOID=sigmoid, RENORMALISE=renormalise, num_warps=WARPS, **_powers(E, count, top_k),
            **early(expert.device),
        )  # fmt: skip
    return expert, weight


def _powers(E: int, count: int, top_k: int) -> dict[str, int]:
    return {
        "GROUPS": triton.next_power_of_2(count),
        "EACH": triton.next_power_of_2(E // count),
        "TOP": triton.next_power_of_2(top_k),
    }


@triton.jit
def _topk(
    logits, bias, expert, weight, E, scale, K: tl.constexpr, G: tl.constexpr, e: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, TOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    row = logits + tl.program_id(0).to(tl.int64) * E
    slot = tl.arange(0, GROUPS * EACH)  # a place in its group, so that groups of any size are rows of a matrix
    own = slot // EACH * e + slot % EACH
    here = (slot // EACH < G) & (slot % EACH < e)
    logit = tl.load(row + own, mask=here, other=-float("inf")).to(tl.float32)
    most, mass = 0.0, 1.0
    if not SIGMOID:
        most = tl.max(logit, axis=0)
        mass = tl.sum(tl.exp(logit - most), axis=0)
    score = _score(logit, most, mass, SIGMOID)
    worth = score if bias is None else score + tl.load(bias + own, mask=here, other=0.0)
    if KEPT < G:
        worth = _only_kept(tl.where(here, worth, -float("inf")), G, KEPT, BEST, GROUPS, EACH)
    rank = tl.where(here, order(worth), -(2**31))
    k = tl.arange(0, TOP)
    chosen = tl.zeros([TOP], tl.int32)
    for i in tl.static_range(K):
        best = tl.min(tl.where(rank == tl.max(rank, axis=0), own, E - 1), axis=0)
        chosen = tl.where(k == i, best, chosen)
        rank = tl.where(own == best, -(2**31), rank)
    weights = tl.where(k < K, _score(tl.load(row + chosen).to(tl.float32), most, mass, SIGMOID), 0.0)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)  # sigmoids may all be zero
    to = tl.program_id(0).to(tl.int64) * K + k
    tl.store(expert + to, chosen.to(tl.int64), mask=k < K)
    tl.store(weight + to, weights * scale, mask=k < K)


@triton.jit
def _score(logit, most, mass, SIGMOID: tl.constexpr):
    return 1.0 / (1.0 + tl.exp(-logit)) if SIGMOID else tl.exp(logit - most) / mass


@triton.jit
def order(x):
    """An int32 that is larger for a larger float32, and largest for NaN. -0 comes before 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _only_kept(
    worth, G: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr
):
    """The worth of experts in groups that are not kept becomes minus infinity."""
    each = tl.reshape(worth, [GROUPS, EACH])
    left, total = each, tl.zeros([GROUPS], tl.float32)
    for _ in tl.static_range(BEST):
        total += tl.max(left, axis=1)
        first = tl.argmax(left, axis=1)
        left = tl.where(tl.arange(0, EACH)[None, :] == first[:, None], -float("inf"), left)
    g = tl.arange(0, GROUPS)
    rank = tl.where(g < G, order(total), -(2**31))
    kept = tl.zeros([GROUPS], tl.int32)
    for _ in tl.static_range(KEPT):
        best = tl.min(tl.where(rank == tl.max(rank, axis=0), g, G - 1), axis=0)
        kept = tl.where(g == best, 1, kept)
        rank = tl.where(g == best, -(2**31), rank)
    return tl.reshape(tl.where(kept[:, None] == 1, each, -float("inf")), [GROUPS * EACH])
