"""Whole tokens: from shares to tokens by slot, from those to tokens by source rank and slot, from those to slot ids.

For ranks that all know the counts of all; what a rank does by itself is in `sources`. Everything is a function of its
arguments, the same on every rank, with no randomness; sums are exact. Where several splits are as good, a source's own
slot is preferred, then its node's. Compiled, but for `assign`, the specification of what a kernel does with a quota.
Legend: L MoE layers, E experts, R (source) ranks, G global slots, T tokens, K top-k; see `replicas` for the rest.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit
from nonet.eplb.replicas import Replicas

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GOLDEN = 0.6180339887498949  # steps of it, modulo 1, visit all places evenly however many are taken
_SMALL = 1e-9  # what is missing to a whole token by rounding of floats


def slot_tokens(count_LE: npt.ArrayLike, share_LG: Floats, replicas: Replicas) -> Ints:
    """int64 [L, G] whole tokens by slot: within 1 of count x share, exact in each expert's sum.

    Of an expert's slots those are rounded up whose ranks have so far lost most by rounding, so ranks stay within about
    one token of their share too.
    """
    count = np.ascontiguousarray(count_LE, dtype=np.int64)
    out_LG = np.zeros(share_LG.shape, np.int64)
    rank_G = replicas.placement.rank_of_slot()
    share = np.ascontiguousarray(share_LG, dtype=np.float64)
    ranks = replicas.placement.fleet.num_ranks
    _slot_tokens(count, share, replicas.order_LG, replicas.count_LE, rank_G, ranks, out_LG)
    return out_LG


def quotas(count_RE: npt.ArrayLike, tokens_G: Ints, replicas: Replicas, layer: int, rank: int | None = None) -> Ints:
    """int64 [R, G]: how many of its tokens each source rank sends to each slot; of one rank: [G].

    count_RE: tokens of each source for each expert; tokens_G: their sum over sources by slot (`slot_tokens`). Both
    margins are exact. A source uses its own slot first, then those of its node, then what is left in order.
    """
    count = np.ascontiguousarray(count_RE, dtype=np.int64)
    fleet = replicas.placement.fleet
    out_RG = np.zeros((fleet.num_ranks if rank is None else 1, fleet.num_slots), np.int64)
    rank_G = replicas.placement.rank_of_slot()
    node_R = np.array(fleet.nodes, np.int64)
    only = -1 if rank is None else rank
    _quotas(count, tokens_G, replicas.order_LG[layer], replicas.count_LE[layer], rank_G, node_R, only, out_RG)
    return out_RG if rank is None else out_RG[0]


def assign(expert_TK: npt.ArrayLike, quota_G: Ints, replicas: Replicas, layer: int) -> Ints:
    """int64 [T, K]: the slot of each (token, expert) pair, given how many pairs each slot gets; -1 for expert -1.

    The j-th pair of an expert (row by row) takes place (j x stride) mod c among its c pairs, and slots own consecutive
    places: every slot gets exactly its quota, and any run of pairs is spread over slots nearly as the whole is, so
    that passes over parts of a batch are balanced too. Places and strides are known before the pass over pairs.
    """
    expert = np.asarray(expert_TK)
    order_G, count_E = replicas.order_LG[layer], replicas.count_LE[layer]
    end_G = np.cumsum(quota_G[order_G])
    first_E = np.cumsum(count_E) - count_E
    pairs_E = np.add.reduceat(quota_G[order_G], first_E)
    begin_E = np.cumsum(pairs_E) - pairs_E
    stride_E = np.array([stride(int(c)) if n > 1 else 1 for c, n in zip(pairs_E, count_E, strict=True)])
    flat = expert.reshape(-1)
    own = flat[flat >= 0]
    assert (np.bincount(own, minlength=len(count_E)) == pairs_E).all(), "a quota is for exactly these pairs"
    by_expert = np.argsort(own, kind="stable")
    turn = np.empty(len(own), np.int64)
    turn[by_expert] = np.arange(len(own)) - (np.cumsum(pairs_E) - pairs_E)[own[by_expert]]
    place = begin_E[own] + turn * stride_E[own] % np.maximum(pairs_E[own], 1)
    out = np.full(len(flat), -1, np.int64)
    out[flat >= 0] = order_G[np.searchsorted(end_G, place, side="right")]
    return out.reshape(expert.shape)


def stride(count: int) -> int:
    """The number nearest to count x golden ratio without a common divisor with count: such steps visit all places."""
    wanted = round(count * GOLDEN)
    for distance in range(count):
        for step in (wanted + distance, wanted - distance):
            if step >= 1 and math.gcd(step, count) == 1:
                return step
    return 1


@jit
def _slot_tokens(
    count_LE: Ints, share_LG: Floats, order_LG: Ints, replicas_LE: Ints, rank_G: Ints, num_ranks: int, out_LG: Ints
) -> None:
    lost_R = np.empty(num_ranks)
    for layer in range(len(count_LE)):
        lost_R[:] = 0.0
        begin = 0
        for e in range(count_LE.shape[1]):
            end = begin + replicas_LE[layer, e]
            left = count_LE[layer, e]
            for i in range(begin, end):
                g = order_LG[layer, i]
                part = count_LE[layer, e] * share_LG[layer, g]
                whole = min(int(part + _SMALL), left)
                out_LG[layer, g] = whole
                left -= whole
                lost_R[rank_G[g]] += part - whole
            for _ in range(left):
                best = -1
                for i in range(begin, end):
                    g = order_LG[layer, i]
                    part = count_LE[layer, e] * share_LG[layer, g]
                    if part - out_LG[layer, g] < _SMALL:  # had none to lose, or was rounded up already
                        continue
                    if best < 0 or lost_R[rank_G[g]] > lost_R[rank_G[best]] + _SMALL:
                        best = g
                if best < 0:  # only by rounding of floats
                    best = order_LG[layer, begin]
                out_LG[layer, best] += 1
                lost_R[rank_G[best]] -= 1.0
            begin = end


@jit
def _quotas(
    count_RE: Ints, tokens_G: Ints, order_G: Ints, replicas_E: Ints, rank_G: Ints, node_R: Ints, only: int, out_RG: Ints
) -> None:
    """only: the rank whose quota is wanted, in the only row of out_RG; -1: all."""
    num_ranks = len(count_RE)
    left_R = np.empty(num_ranks, np.int64)
    left_G = tokens_G.copy()
    one_node = node_R.max() == node_R.min()
    begin = 0
    for e in range(count_RE.shape[1]):
        end = begin + replicas_E[e]
        if end - begin == 1:
            for i in range(len(out_RG)):
                out_RG[i, order_G[begin]] = count_RE[i if only < 0 else only, e]
            begin = end
            continue
        for r in range(num_ranks):
            left_R[r] = count_RE[r, e]
        for near in range(3):  # 0: a source's own slot; 1: those of its node; 2: any
            if near == 1 and one_node:
                continue
            done = 0  # sources with nothing left, where all are asked in order
            for i in range(begin, end):
                g = order_G[i]
                home = rank_G[g]
                while near == 2 and done < num_ranks and left_R[done] == 0:
                    done += 1
                r, stop = (home, home + 1) if near == 0 else (done, num_ranks)
                while r < stop and left_G[g] > 0:
                    if near != 1 or node_R[r] == node_R[home]:
                        tokens = min(left_R[r], left_G[g])
                        left_R[r] -= tokens
                        left_G[g] -= tokens
                        if only < 0:
                            out_RG[r, g] += tokens
                        elif only == r:
                            out_RG[0, g] += tokens
                    r += 1
        begin = end
