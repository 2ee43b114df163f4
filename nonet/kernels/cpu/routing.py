"""Choosing experts, and grouping (row, slot) pairs by slot. Specified by `moe.router` and `moe.base`.

Legend: T tokens, E experts, K top-k, N rows, S slots of this rank, M = N * K pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import exp, f32, for_types, jit

Pairs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def softmax_topk(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """(expert_TK int64, weight_TK float32), largest first; of equal ones the lower expert."""
    T = logits_TE.shape[0]
    expert, weight = torch.empty((T, top_k), dtype=torch.int64), torch.empty((T, top_k), dtype=torch.float32)
    _topk(view(logits_TE), renormalise, view(expert), view(weight))
    return expert, weight


def count_experts(expert_TK: Tensor, count_E: Tensor) -> None:
    """Add to count_E (int64) how often each expert stands in expert_TK."""
    _count(expert_TK.numpy().reshape(-1), view(count_E))


def look_up(expert_TK: Tensor, slot_EC: Tensor, count_E: Tensor, first: int) -> Tensor:
    """Global slots, int64 [T, K]: the replicas of an expert in turn, beginning with number `first`."""
    slot = torch.empty(expert_TK.shape, dtype=torch.int64)
    _look_up(view(expert_TK.contiguous()), view(slot_EC), view(count_E), first, view(slot))
    return slot


def spread(expert_TK: Tensor, quota_G: np.ndarray, order_G: np.ndarray, replicas_E: np.ndarray) -> Tensor:
    """Global slots, int64 [T, K]: each slot gets its quota of its expert's pairs. Specified by `moe.waterfill.spread`.

    order_G: the slots grouped by expert, of which each expert has `replicas_E` (all int64).
    """
    slot = torch.empty(expert_TK.shape, dtype=torch.int64)
    _spread(view(expert_TK.contiguous()), quota_G, order_G, replicas_E, view(slot))
    return slot


def group(slot_NK: Tensor, weight_NK: Tensor, first: int, num_slots: int) -> Pairs:
    """(row_M, weight_M, pair_NK, start_S, count_S) of `moe.base.Dispatched`, for slots first .. first + S - 1.

    slot_NK is int64 or int32; neither input need be contiguous.
    """
    N, K = slot_NK.shape
    # pairs of other ranks come last, as zeros: a row that exists and no weight
    row, weight = torch.zeros(N * K, dtype=torch.int64), torch.zeros(N * K, dtype=torch.float32)
    pair = torch.empty((N, K), dtype=torch.int64)
    start, count = torch.empty(num_slots, dtype=torch.int64), torch.empty(num_slots, dtype=torch.int64)
    outputs = (row.numpy(), weight.numpy(), pair.numpy(), start.numpy(), count.numpy())
    _group(slot_NK.numpy(), weight_NK.numpy(), first, *outputs)
    return row, weight, pair, start, count


@jit(*for_types("void(T[:,::1], boolean, int64[:,::1], float32[:,::1])"))
def _topk(logits, renormalise, expert, weight):
    T, E = logits.shape
    K = expert.shape[1]
    score = np.empty(E, np.float32)
    for t in range(T):
        row = logits[t]
        top = np.float32(-np.inf)
        for e in range(E):
            score[e] = f32(row[e])
            top = max(top, score[e])
        mass = np.float32(0)
        for e in range(E):
            score[e] = exp(score[e] - top)
            mass += score[e]
        chosen = np.float32(0)
        for k in range(K):
            best = 0
            for e in range(1, E):
                if score[e] > score[best]:
                    best = e
            expert[t, k], weight[t, k] = best, score[best] / mass
            chosen += weight[t, k]
            score[best] = np.float32(-1)
        if renormalise:
            for k in range(K):
                weight[t, k] /= chosen


@jit("void(int64[::1], int64[::1])")
def _count(expert, count):
    for i in range(len(expert)):
        count[expert[i]] += 1


@jit("void(int64[:,::1], int64[:,::1], int64[::1], int64, int64[:,::1])")
def _look_up(expert, slots, replicas, first, out):
    T, K = expert.shape
    came = np.zeros(len(replicas), np.int64)
    for t in range(T):
        for k in range(K):
            e = expert[t, k]
            out[t, k] = slots[e, (came[e] + first) % replicas[e]]
            came[e] += 1


@njit(nogil=True)
def assign(slot, weight, first, row_out, weight_out, pair, start, count):
    """A counting sort of the pairs by slot; what lies outside first .. first + S - 1 is on another rank."""
    N, K = slot.shape
    S = len(count)
    count[:] = 0
    for n in range(N):
        for k in range(K):
            s = slot[n, k] - first
            if 0 <= s < S:
                count[s] += 1
    total = 0
    for s in range(S):
        start[s] = total
        total += count[s]
    place = start.copy()
    for n in range(N):
        for k in range(K):
            s = slot[n, k] - first
            if 0 <= s < S:
                m = place[s]
                place[s] += 1
                row_out[m], weight_out[m], pair[n, k] = n, weight[n, k], m
            else:
                pair[n, k] = -1


@jit(
    "void(int64[:,:], float32[:,:], int64, int64[::1], float32[::1], int64[:,::1], int64[::1], int64[::1])",
    "void(int32[:,:], float32[:,:], int64, int64[::1], float32[::1], int64[:,::1], int64[::1], int64[::1])",
)
def _group(slot, weight, first, row_out, weight_out, pair, start, count):
    assign(slot, weight, first, row_out, weight_out, pair, start, count)


@njit
def _step(count):
    """The number nearest to count x golden ratio that shares no divisor with count (`eplb.quota.stride`)."""
    wanted = int(np.rint(count * 0.6180339887498949))
    for distance in range(count):
        for step in (wanted + distance, wanted - distance):
            a, b = count, step
            while b > 0:
                a, b = b, a % b
            if step >= 1 and a == 1:
                return step
    return 1


@jit("void(int64[:,::1], int64[::1], int64[::1], int64[::1], int64[:,::1])")
def _spread(expert, quota, order, replicas, out):
    E = len(replicas)
    first, came = np.zeros(E, np.int64), np.zeros(E, np.int64)
    pairs, step = np.zeros(E, np.int64), np.ones(E, np.int64)
    begin = 0
    for e in range(E):
        first[e] = begin
        for i in range(begin, begin + replicas[e]):
            pairs[e] += quota[order[i]]
        begin += replicas[e]
        if replicas[e] > 1:
            step[e] = _step(pairs[e])
    T, K = expert.shape
    for t in range(T):
        for k in range(K):
            e = expert[t, k]
            i = first[e]
            if replicas[e] > 1:
                place = came[e] * step[e] % pairs[e]
                came[e] += 1
                while place >= quota[order[i]]:
                    place -= quota[order[i]]
                    i += 1
            out[t, k] = order[i]
