"""From the placement there is to a better one with few transfers, for the `nonet` policy.

A transfer is an expert that a rank must load: it holds it now and did not before. Of the moves that take overload off
the slowest rank, the one that takes most for each transfer is made, until the slowest rank is good enough, nothing
helps or no transfer is left.
Legend: E experts, R ranks, G slots, I changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._search import (
    Bools,
    over,
    overload_change,
)
from nonet.eplb.policies._state import (
    EMPTY,
    Ints,
    State,
    components,
    components_without,
    join,
    put,
    replace,
    root,
    swap,
    weigh_all,
)

FREE = 0.1  # transfers that a move without any counts as, so that moves can be compared
LEAST_PART = 0.02  # of the slowest rank's overload: no transfer is for less


@jit
def resume(s: State, current_G: npt.NDArray[np.int32]) -> Bools:
    """Fill `s` with what the slots hold now; was_RE: which rank held which expert. A second replica on a rank is left
    out, and its slot stays empty."""
    for g in range(len(current_G)):
        if not s.held_RE[s.rank_G[g], current_G[g]]:
            put(s, g, current_G[g])
    weigh_all(s)
    return s.held_RE.copy()


@jit
def transfers(s: State, was_RE: Bools) -> int:
    count = 0
    for g in range(len(s.expert_G)):
        count += s.expert_G[g] != EMPTY and not was_RE[s.rank_G[g], s.expert_G[g]]
    return count


@jit
def _cost(s: State, was_RE: Bools, g: int, e: int) -> int:
    """The transfers that are added if slot g gets e."""
    r = s.rank_G[g]
    return int(not was_RE[r, e]) - int(s.expert_G[g] != EMPTY and not was_RE[r, s.expert_G[g]])


@jit
def rescue(s: State, order_E: Ints) -> int:
    """Give each expert that is nowhere a slot: an empty one, or that of the replica missed least. How many."""
    lost = 0
    for e in order_E:
        if s.count_E[e]:
            continue
        lost += 1
        best, least = -1, np.inf
        for g in range(len(s.expert_G)):
            y = s.expert_G[g]
            if y != EMPTY and s.count_E[y] == 1:
                continue
            gone = 0.0 if y == EMPTY else s.size_E[y]
            growth = 0.0 if y == EMPTY else s.load_E[y] / (s.count_E[y] - 1) - s.size_E[y]
            value = max(s.load_R[s.rank_G[g]] - gone * s.cost_R[s.rank_G[g]], growth * s.cost_R[s.rank_G[g]])
            if value < least:
                best, least = g, value
        _give(s, best, e)
    return lost


@jit
def _give(s: State, g: int, e: int) -> None:
    """Slot g, empty or not, gets e."""
    if s.expert_G[g] == EMPTY:
        put(s, g, e)
        weigh_all(s)
    else:
        replace(s, g, e)


@jit
def fill_best(s: State, was_RE: Bools, left: int) -> int:
    """Empty slots get a replica of the largest expert that the rank does not hold, within the transfers left."""
    used = 0
    for g in range(len(s.expert_G)):
        if s.expert_G[g] == EMPTY and used < left:
            best = -1
            for e in range(len(s.load_E)):
                if not s.held_RE[s.rank_G[g], e] and (best < 0 or s.size_E[e] > s.size_E[best]):
                    best = e
            used += _cost(s, was_RE, g, best)
            _give(s, g, best)
    return used


@jit
def adapt(s: State, was_RE: Bools, enough: float, aim: float, parts: int, cap: int) -> None:
    """Make the moves that take most overload off for each transfer, at most `cap` transfers in all."""
    loose_G = np.ones(len(s.expert_G), np.bool_)
    used = transfers(s, was_RE)
    for _ in range(4 * len(s.expert_G)):
        hot = int(np.argmax(s.load_R))
        if s.load_R[hot] <= enough:
            return
        if parts:
            components(s, loose_G)
        least = LEAST_PART * (s.load_R[hot] - aim) * (s.load_R[hot] - aim)
        rate, g, x = _best_change(s, was_RE, hot, aim, parts, cap - used, least, loose_G)
        swap_rate, p, q = _best_exchange(s, was_RE, hot, aim, cap - used, least, loose_G)
        if max(rate, swap_rate) <= 0:
            return
        if swap_rate > rate:
            used += _cost(s, was_RE, p, s.expert_G[q]) + _cost(s, was_RE, q, s.expert_G[p])
            swap(s, p, q)
        else:
            used += _cost(s, was_RE, g, x)
            replace(s, g, x)


@jit
def _best_exchange(
    s: State, was_RE: Bools, hot: int, aim: float, left: int, least: float, loose_G: Bools
) -> tuple[float, int, int]:
    """(overload taken off for each transfer, slot of `hot`, slot of another rank) of the best exchange; 0 if none."""
    best, best_g, best_h = 0.0, -1, -1
    for q in range(len(s.load_R)):
        if s.load_R[q] >= aim:
            continue
        for g in range(s.first_R[hot], s.first_R[hot + 1]):
            a = s.expert_G[g]
            if a == EMPTY or not loose_G[g] or s.held_RE[q, a]:
                continue
            for h in range(s.first_R[q], s.first_R[q + 1]):
                b = s.expert_G[h]
                if b == EMPTY or s.size_E[b] >= s.size_E[a] or not loose_G[h] or s.held_RE[hot, b]:
                    continue
                change = s.size_E[a] - s.size_E[b]
                gain = -over(s, hot, -change, aim) - over(s, q, change, aim)
                if gain <= least:
                    continue
                cost = _cost(s, was_RE, g, b) + _cost(s, was_RE, h, a)
                if cost <= left and gain / max(cost, FREE) > best:
                    best, best_g, best_h = gain / max(cost, FREE), g, h
    return best, best_g, best_h


@jit
def _best_change(
    s: State, was_RE: Bools, hot: int, aim: float, parts: int, left: int, least: float, loose_G: Bools
) -> tuple[float, int, int]:
    """(overload taken off for each transfer, slot, expert it gets) of the best change of replicas; 0 if none."""
    best, best_g, best_x = 0.0, -1, -1
    above_R = np.empty(len(s.load_R), np.int64)
    for g in range(len(s.expert_G)):
        y, q = s.expert_G[g], s.rank_G[g]
        if y == EMPTY or s.count_E[y] == 1 or (q != hot and s.held_RE[hot, y]):
            continue
        split = 0  # parts without g, once known
        width = len(s.load_E) if q == hot else s.first_R[hot + 1] - s.first_R[hot]
        for i in range(width):
            x = i if q == hot else s.expert_G[s.first_R[hot] + i]
            if x == EMPTY or s.held_RE[q, x]:
                continue
            cost = _cost(s, was_RE, g, x)
            price = max(cost, FREE)
            gain = -overload_change(s, g, x, aim)
            if cost > left or gain <= least or gain / price <= best:
                continue
            if parts and not loose_G[g]:
                if split == 0:
                    split = components_without(s, g, above_R)
                if split - (root(above_R, q) != root(above_R, s.rank_G[s.slot_EK[x, 0]])) > parts:
                    continue
            best, best_g, best_x = gain / price, g, x
    return best, best_g, best_x


@jit
def connect(s: State, was_RE: Bools, enough: float, cap: int, most_harm: float) -> None:
    """Change replicas that hold no parts together so that they join parts, where that adds no more overload than
    `most_harm`; at most `cap` transfers in all."""
    loose_G = np.ones(len(s.expert_G), np.bool_)
    used = transfers(s, was_RE)
    for _ in range(len(s.load_R)):
        if components(s, loose_G) == 1:
            return
        above_R = np.arange(len(s.load_R))
        for e in range(len(s.load_E)):
            for k in range(1, s.count_E[e]):
                join(above_R, s.rank_G[s.slot_EK[e, 0]], s.rank_G[s.slot_EK[e, k]])
        best, best_g, best_x = np.inf, -1, -1
        for g in range(len(s.expert_G)):
            y = s.expert_G[g]
            if y == EMPTY or s.count_E[y] == 1 or not loose_G[g]:
                continue
            for x in range(len(s.load_E)):
                if root(above_R, s.rank_G[g]) == root(above_R, s.rank_G[s.slot_EK[x, 0]]):
                    continue
                if used + _cost(s, was_RE, g, x) > cap:
                    continue
                harm = overload_change(s, g, x, enough)
                if harm < best:
                    best, best_g, best_x = harm, g, x
        if best > most_harm:
            return
        used += _cost(s, was_RE, best_g, best_x)
        replace(s, best_g, best_x)
