"""Local search of the `nonet` policy: lower the slowest rank, move by move, until it is good enough or stuck.

A move exchanges one or two experts of two ranks, or gives a slot of an expert with several replicas to another expert.
Where none helps at once, one that helps after repair is looked for. With `parts` above 0 no move may leave
the ranks in more parts than that (0: any). Overload: what ranks have above `enough`, squared and summed.
Legend: E experts, R ranks, G slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._state import (
    Floats,
    Ints,
    State,
    components,
    components_without,
    refill,
    replace,
    root,
    swap,
)

Bools = npt.NDArray[np.bool_]
LEAST_GAIN = 1e-4  # of what the slowest rank has above `enough`: no step is for less
LEAST_GAIN_OF_PAIRS = 0.1  # these take long to find
REACH_OF_PAIRS = 0.03  # relative: what is further above `enough` is no question of finer steps
CHOICES = 4  # changes of replicas that are kept, and tried with repair


class Changes(NamedTuple):
    """The best changes of replicas found: slot g gets expert x, which changes the overload by so much."""

    slot_I: Ints
    expert_I: Ints
    value_I: Floats


@jit
def _search(s: State, enough: float, parts: int, most_steps: int, changes: Changes) -> int:
    """Improve until the slowest rank's time is at most `enough`, or nothing helps at once; then `changes` are what
    may help after repair, as many as are returned."""
    loose_G = np.ones(len(s.expert_G), np.bool_)
    stale = parts > 0
    for _ in range(most_steps):
        hot = int(np.argmax(s.load_R))
        if s.load_R[hot] <= enough:
            return 0
        if stale:
            components(s, loose_G)
            stale = False
        g, h = _best_swap(s, hot, enough, loose_G)
        if g >= 0:
            stale = parts > 0 and (s.count_E[s.expert_G[g]] > 1 or s.count_E[s.expert_G[h]] > 1)
            swap(s, g, h)
            continue
        stale = parts > 0
        if s.load_R[hot] < enough * (1 + REACH_OF_PAIRS) and _swap_pairs(s, hot, enough, loose_G):
            continue
        found = find_changes(s, hot, enough, parts, loose_G, changes)
        least = LEAST_GAIN * (s.load_R[hot] - enough) * (s.load_R[hot] - enough)
        if found == 0 or changes.value_I[0] >= -least or not _replaced(s, changes):
            return found
    return 0


@jit
def _replaced(s: State, changes: Changes) -> bool:
    """Make the best change, unless another rank becomes slower than the slowest was."""
    before, g = s.load_R.max(), changes.slot_I[0]
    y = s.expert_G[g]
    replace(s, g, changes.expert_I[0])
    if s.load_R.max() <= before:
        return True
    replace(s, g, y)
    return False


@jit
def _best_swap(s: State, hot: int, enough: float, loose_G: Bools) -> tuple[int, int]:
    """The slots of rank `hot` and another to exchange such that the slower of both ranks is fastest; -1 if none."""
    limit = s.load_R[hot] * (1 - LEAST_GAIN)
    best_g, best_h = -1, -1
    cold = int(np.argmin(s.load_R))
    for i in range(len(s.load_R)):
        q = cold if i == 0 else (i if i > cold else i - 1)  # the coldest first
        if q == hot or _mean(s, hot, q) >= limit:
            continue
        for g in range(s.first_R[hot], s.first_R[hot + 1]):
            a = s.expert_G[g]
            if not loose_G[g] or s.held_RE[q, a]:
                continue
            for h in range(s.first_R[q], s.first_R[q + 1]):
                b = s.expert_G[h]
                change = s.size_E[a] - s.size_E[b]
                slower = max(s.load_R[hot] - change * s.cost_R[hot], s.load_R[q] + change * s.cost_R[q])
                if slower < limit and loose_G[h] and not s.held_RE[hot, b]:
                    best_g, best_h, limit = g, h, slower
        if best_g >= 0 and limit <= enough:
            break
    return best_g, best_h


@jit
def _mean(s: State, p: int, q: int) -> float:
    """The time of two ranks that share their load as well as can be."""
    tokens = s.load_R[p] / s.cost_R[p] + s.load_R[q] / s.cost_R[q]
    return tokens / (1 / s.cost_R[p] + 1 / s.cost_R[q])


@jit
def _swap_pairs(s: State, hot: int, enough: float, loose_G: Bools) -> bool:
    """Exchange two experts of rank `hot` for two of another such that the slower of both ranks is fastest."""
    limit = s.load_R[hot] - LEAST_GAIN_OF_PAIRS * (s.load_R[hot] - enough)
    best_G = np.full(4, -1)
    for q in range(len(s.load_R)):
        if q == hot or _mean(s, hot, q) >= limit:
            continue
        for g in range(s.first_R[hot], s.first_R[hot + 1]):
            if not loose_G[g] or s.held_RE[q, s.expert_G[g]]:
                continue
            for g2 in range(g + 1, s.first_R[hot + 1]):
                if not loose_G[g2] or s.held_RE[q, s.expert_G[g2]]:
                    continue
                given = s.size_E[s.expert_G[g]] + s.size_E[s.expert_G[g2]]
                for h in range(s.first_R[q], s.first_R[q + 1]):
                    rest = given - s.size_E[s.expert_G[h]]
                    for h2 in range(h + 1, s.first_R[q + 1]):
                        change = rest - s.size_E[s.expert_G[h2]]
                        slower = max(s.load_R[hot] - change * s.cost_R[hot], s.load_R[q] + change * s.cost_R[q])
                        if slower >= limit or not loose_G[h] or not loose_G[h2]:
                            continue
                        if not s.held_RE[hot, s.expert_G[h]] and not s.held_RE[hot, s.expert_G[h2]]:
                            best_G[0], best_G[1], best_G[2], best_G[3] = g, h, g2, h2
                            limit = slower
        if best_G[0] >= 0 and limit <= enough:
            break
    if best_G[0] < 0:
        return False
    swap(s, best_G[0], best_G[1])
    swap(s, best_G[2], best_G[3])
    return True


@jit
def no_changes() -> Changes:
    return Changes(np.zeros(CHOICES, np.int64), np.zeros(CHOICES, np.int64), np.zeros(CHOICES))


@jit
def find_changes(s: State, hot: int, enough: float, parts: int, loose_G: Bools, out: Changes) -> int:
    """The changes of replicas that take load off rank `hot` with the least overload after; how many, best first."""
    found = 0
    above_R = np.empty(len(s.load_R), np.int64)
    for g in range(len(s.expert_G)):
        y, q = s.expert_G[g], s.rank_G[g]
        if s.count_E[y] == 1 or (q != hot and s.held_RE[hot, y]):
            continue
        split = 0  # parts without g, once known
        width = len(s.load_E) if q == hot else s.first_R[hot + 1] - s.first_R[hot]
        for i in range(width):
            x = i if q == hot else s.expert_G[s.first_R[hot] + i]
            if s.held_RE[q, x] or (q == hot and s.load_E[x] / (s.count_E[x] + 1) >= s.size_E[y]):
                continue
            most = out.value_I[CHOICES - 1] if found == CHOICES else np.inf
            value = overload_change(s, g, x, enough)
            if value >= most:
                continue
            if parts and not loose_G[g]:
                if split == 0:
                    split = components_without(s, g, above_R)
                if split - (root(above_R, q) != root(above_R, s.rank_G[s.slot_EK[x, 0]])) > parts:
                    continue
            at = min(found, CHOICES - 1)
            while at > 0 and out.value_I[at - 1] > value:
                out.value_I[at], out.slot_I[at] = out.value_I[at - 1], out.slot_I[at - 1]
                out.expert_I[at] = out.expert_I[at - 1]
                at -= 1
            out.value_I[at], out.slot_I[at], out.expert_I[at] = value, g, x
            found = min(found + 1, CHOICES)
    return found


@jit
def overload_change(s: State, g: int, x: int, enough: float) -> float:
    """By how much the overload changes if slot g gets x."""
    y, q = s.expert_G[g], s.rank_G[g]
    less = s.load_E[x] / (s.count_E[x] + 1) - s.size_E[x]  # change of a replica of x, below 0
    more = s.load_E[y] / (s.count_E[y] - 1) - s.size_E[y]
    total = over(s, q, s.size_E[x] + less - s.size_E[y], enough)
    for k in range(s.count_E[x]):
        r = s.rank_G[s.slot_EK[x, k]]
        if not s.held_RE[r, y]:
            total += over(s, r, less, enough)
    for k in range(s.count_E[y]):
        r = s.rank_G[s.slot_EK[y, k]]
        if r != q:
            total += over(s, r, more + less if s.held_RE[r, x] else more, enough)
    return total


@jit
def over(s: State, r: int, change: float, enough: float) -> float:
    """By how much the overload changes if rank r gets so many tokens more."""
    after = max(0.0, s.load_R[r] + change * s.cost_R[r] - enough)
    before = max(0.0, s.load_R[r] - enough)
    return after * after - before * before


@jit
def overload(s: State, enough: float) -> float:
    total = 0.0
    for r in range(len(s.load_R)):
        above = max(0.0, s.load_R[r] - enough)
        total += above * above
    return total


@jit
def improve(s: State, enough: float, parts: int, most_tries: int) -> int:
    """Search; where that ends, leave the dead end by a change of replicas that helps once the search has repaired what
    it did, the changes with the least overload at once first. Ends after most_tries repairs that were tried."""
    changes, latest = no_changes(), no_changes()
    before_G, worst, slowest = s.expert_G, np.inf, np.inf  # what a try must beat
    tries, found, at = 0, 0, 0
    while True:
        more = _search(s, enough, parts, (2 if tries else 40) * len(s.load_R), latest)
        now = overload(s, enough)
        if now < worst * 0.999 and s.load_R.max() <= slowest:
            before_G, worst, slowest = s.expert_G.copy(), now, s.load_R.max()
            if now == 0 or tries >= most_tries:
                return tries
            found, at = more, 0
            changes.slot_I[:] = latest.slot_I
            changes.expert_I[:] = latest.expert_I
        else:
            refill(s, before_G)
        if at == found:
            return tries
        replace(s, changes.slot_I[at], changes.expert_I[at])
        at += 1
        tries += 1
