"""First placements of the `nonet` policy: how many replicas each expert gets, and a greedy place for each.

Largest first to the least loaded rank (LPT), never twice to one rank. Where there are replicas enough, those of hot
experts are laid such that they connect the ranks: load can then be shifted between any two ranks, step by step.
Legend: E experts, R ranks, G slots.
"""

from __future__ import annotations

import numpy as np

from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._state import EMPTY, Floats, Ints, State, join, put, root, weigh_all


def orders(load_LE: Floats, count_LE: Ints, replicated_first: bool) -> Ints:
    """[L, E] the experts by the size of one replica, largest first, ties to the lower; those with several replicas
    before the others if asked for."""
    order_LE = np.argsort(-load_LE / count_LE, axis=1, kind="stable")
    if not replicated_first:
        return order_LE
    single_LE = np.take_along_axis(count_LE == 1, order_LE, axis=1)
    return np.take_along_axis(order_LE, np.argsort(single_LE, axis=1, kind="stable"), axis=1)


@jit
def replicate(load_LE: Floats, num_slots: int, most: int) -> Ints:
    """count_LE: one more replica to the largest load / replicas, at most `most` each. Least possible largest size."""
    count_LE = np.ones(load_LE.shape, np.int64)
    for layer in range(len(load_LE)):
        load_E, count_E = load_LE[layer], count_LE[layer]
        size_E = load_E.copy()
        for _ in range(len(load_E), num_slots if most > 1 else 0):
            e = int(np.argmax(size_E))
            if size_E[e] < 0:  # all experts are on all ranks
                break
            count_E[e] += 1
            size_E[e] = load_E[e] / count_E[e] if count_E[e] < most else -1.0
    return count_LE


@jit
def build(s: State, count_E: Ints, order_E: Ints, node_R: Ints, home_E: Ints, connect: bool) -> None:
    """Fill the empty slots of `s` with count_E replicas of each expert, or nearly so where that cannot be, in order.

    home_E: the node for an expert's first replica, while that has room; -1: any. connect: each further replica goes
    to the least loaded rank that is not yet connected with the first one.
    """
    used_R = np.zeros(len(s.load_R), np.int64)
    key_R = np.where(s.first_R[1:] > s.first_R[:-1], 0.0, np.inf)  # load, or infinite for a rank without a free slot
    above_R = np.arange(len(s.load_R))
    for e in range(len(count_E)):
        s.size_E[e] = s.load_E[e] / count_E[e]
    for e in order_E:
        for i in range(count_E[e]):
            r = -1
            if i == 0 and home_E[e] >= 0:
                r = _lightest(s, np.where(node_R == home_E[e], key_R, np.inf), e, False, above_R)
            if r < 0:
                r = _lightest(s, key_R, e, i > 0 and connect, above_R)
            if r < 0:  # all ranks with room hold it already
                break
            put(s, s.first_R[r] + used_R[r], e)
            used_R[r] += 1
            key_R[r] += s.size_E[e] * s.cost_R[r]
            if used_R[r] == s.first_R[r + 1] - s.first_R[r]:
                key_R[r] = np.inf
            if i:
                join(above_R, r, s.rank_G[s.slot_EK[e, 0]])
    fill(s)
    weigh_all(s)


@jit
def _lightest(s: State, key_R: Floats, e: int, connect: bool, above_R: Ints) -> int:
    """The rank that is least loaded once it has e too, of those not connected with e's first one if there are any."""
    best, joined, least, least_joined = -1, -1, np.inf, np.inf
    for r in range(len(key_R)):
        time = key_R[r] + s.size_E[e] * s.cost_R[r]
        if time < least and not s.held_RE[r, e]:
            best, least = r, time
        if not connect or time >= least_joined or s.held_RE[r, e]:
            continue
        if root(above_R, r) != root(above_R, s.rank_G[s.slot_EK[e, 0]]):
            joined, least_joined = r, time
    return joined if joined >= 0 else best


@jit
def fill(s: State) -> None:
    """Each empty slot gets a further replica of the largest expert that its rank does not hold."""
    for g in range(len(s.expert_G)):
        if s.expert_G[g] != EMPTY:
            continue
        best, most = -1, -1.0
        for e in range(len(s.load_E)):
            size = s.load_E[e] / max(s.count_E[e], 1)
            if not s.held_RE[s.rank_G[g], e] and size > most:
                best, most = e, size
        put(s, g, best)
