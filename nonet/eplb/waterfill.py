"""Water-filling: how to split experts over their hosts so that the slowest rank is as fast as can be. Compiled.

One expert after the other is poured over its hosts, the lowest first, in sweeps over all of them: each pour is the
exact minimum of the sum of load^2 / speed for one expert, so the limit is the split with the least such sum, which also
has the least hottest rank (the optimum of that linear programme). Along chains of ranks sweeps alone are slow. So a
pass over a spanning forest comes first, which levels each tree exactly where no split runs out of tokens, and before
each sweep one that pulls load away from the hottest rank, over as many ranks as it takes; that one also proves how near
the optimum is. No solver, no randomness, the same bits on every rank. Called by `dispatch`, which owns the arrays;
legend: `replicas`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@jit
def solve(
    load_LE: Floats, share_H: Floats, home_LE: Ints, first_L: Ints, expert_M: Ints, start_M: Ints, rank_H: Ints,
    of_H: Ints, held_LR: Ints, held_H: Ints, tree_LR3: Ints, root_LR: Ints, speed_R: Floats, sweeps: int,
    tolerance: float, load_LR: Floats,
) -> None:  # fmt: skip
    """Improve share_H in place and fill load_LR (tokens of each rank).

    At most `sweeps` sweeps a layer, fewer once its hottest rank is within `tolerance` (relative) of a lower bound.
    """
    widest = 1
    for m in range(len(expert_M)):
        widest = max(widest, start_M[m + 1] - start_M[m])
    amount_H, rest, target = np.empty(len(rank_H)), np.empty(widest), np.empty(widest)
    queue_R, own_R, up_R = np.empty_like(root_LR[0]), np.empty_like(root_LR[0]), np.empty_like(root_LR[0])
    for layer in range(len(load_LE)):
        first, last = first_L[layer], first_L[layer + 1]
        load_E, rank_load = load_LE[layer], load_LR[layer]
        rank_load[:] = 0.0
        for e in range(len(load_E)):
            if home_LE[layer, e] >= 0:
                rank_load[home_LE[layer, e]] += load_E[e]
        for m in range(first, last):
            for h in range(start_M[m], start_M[m + 1]):
                amount_H[h] = share_H[h] * load_E[expert_M[m]]
                rank_load[rank_H[h]] += amount_H[h]
        if sweeps > 0:
            own_H = amount_H[start_M[first] : start_M[last]]
            _level_trees(tree_LR3[layer], root_LR[layer], rank_H, amount_H, own_H, rank_load, speed_R)
        for sweep in range(sweeps):
            gap = _relieve(
                start_M, rank_H, of_H, held_LR[layer], held_H, amount_H, rank_load, speed_R, queue_R, own_R, up_R
            )
            if gap <= tolerance:
                break
            for i in range(last - first):
                m = first + i if sweep % 2 == 0 else last - 1 - i
                load, start, end = load_E[expert_M[m]], start_M[m], start_M[m + 1]
                if load > 0.0 and end - start == 2:  # most experts; the same as below, without its loops
                    one, two = rank_H[start], rank_H[start + 1]
                    rest_one, rest_two = rank_load[one] - amount_H[start], rank_load[two] - amount_H[start + 1]
                    wanted = speed_R[one] * (load + rest_two) - speed_R[two] * rest_one
                    part = min(max(wanted / (speed_R[one] + speed_R[two]), 0.0), load)
                    amount_H[start], amount_H[start + 1] = part, load - part
                    rank_load[one], rank_load[two] = rest_one + part, rest_two + (load - part)
                elif load > 0.0:
                    _pour(load, start, end, rank_H, amount_H, rank_load, speed_R, rest, target)
        for m in range(first, last):
            load = load_E[expert_M[m]]
            if load > 0.0:
                for h in range(start_M[m], start_M[m + 1]):
                    share_H[h] = amount_H[h] / load


@jit
def _level_trees(
    tree_R3: Ints, root_R: Ints, rank_H: Ints, amount_H: Floats, own_H: Floats, rank_load: Floats, speed_R: Floats
) -> None:
    """From the leaves to the roots, each rank hands its parent what it has above the mean of its tree, or asks for it.

    Taken back if that raised the sum of load^2 / speed: where a split runs out of tokens, it can. own_H is the part of
    amount_H that belongs to this layer.
    """
    load_T, speed_T = np.zeros(len(speed_R)), np.zeros(len(speed_R))
    loads, amounts = rank_load.copy(), own_H.copy()
    before, after = 0.0, 0.0
    for r in range(len(speed_R)):
        load_T[root_R[r]] += rank_load[r]
        speed_T[root_R[r]] += speed_R[r]
        before += rank_load[r] * rank_load[r] / speed_R[r]
    for i in range(len(tree_R3)):
        rank, own, up = tree_R3[i]
        if own >= 0:
            root = root_R[rank]
            above = rank_load[rank] - load_T[root] / speed_T[root] * speed_R[rank]
            above = max(min(above, amount_H[own]), -amount_H[up])
            amount_H[own] -= above
            amount_H[up] += above
            rank_load[rank] -= above
            rank_load[rank_H[up]] += above
    for r in range(len(speed_R)):
        after += rank_load[r] * rank_load[r] / speed_R[r]
    if after > before:
        rank_load[:] = loads
        own_H[:] = amounts


@jit
def _pour(
    load: float, start: int, end: int, rank_H: Ints, amount_H: Floats, rank_load: Floats, speed_R: Floats,
    rest: Floats, target: Floats,
) -> None:  # fmt: skip
    """Split one expert: the hosts below the common level are filled up to it, those above get nothing."""
    total, speeds = load, 0.0
    for h in range(start, end):
        rank = rank_H[h]
        rest[h - start] = rank_load[rank] - amount_H[h]
        total += rest[h - start]
        speeds += speed_R[rank]
        target[h - start] = 1.0
    changed = True
    while changed:  # at most once a host: leaving one out only lowers the level
        changed = False
        level = total / speeds
        for i in range(end - start):
            speed = speed_R[rank_H[start + i]]
            if target[i] > 0.0 and rest[i] > level * speed:
                target[i] = 0.0
                total -= rest[i]
                speeds -= speed
                changed = True
    level = total / speeds
    for i in range(end - start):
        rank = rank_H[start + i]
        if target[i] > 0.0:
            target[i] = max(0.0, level * speed_R[rank] - rest[i])
        amount_H[start + i] = target[i]
        rank_load[rank] = rest[i] + target[i]


@jit
def _relieve(
    start_M: Ints, rank_H: Ints, of_H: Ints, held_R: Ints, held_H: Ints, amount_H: Floats, rank_load: Floats,
    speed_R: Floats, queue_R: Ints, own_R: Ints, up_R: Ints,
) -> float:  # fmt: skip
    """Pull load away from the hottest rank; returns how far (relative) it was above its lower bound before.

    Tokens on the hottest rank could leave to another host of their expert; from there others could, and so on. What
    lies on the ranks so reached cannot leave them, so no split brings their hottest below their mean: the bound. From
    the farthest back to the hottest, each rank pulls what it lacks to that mean from the rank that reached it. None
    rises above the mean or what it had, so the hottest never gets hotter.
    """
    hottest = 0
    for r in range(len(speed_R)):
        own_R[r] = -1
        if rank_load[r] / speed_R[r] > rank_load[hottest] / speed_R[hottest]:
            hottest = r
    top = rank_load[hottest] / speed_R[hottest]
    queue_R[0], reached, i = hottest, 1, 0
    own_R[hottest] = 0
    load, speed = 0.0, 0.0
    while i < reached:
        rank = queue_R[i]
        i += 1
        load += rank_load[rank]
        speed += speed_R[rank]
        for j in range(held_R[rank], held_R[rank + 1]):
            here = held_H[j]
            if amount_H[here] > 1e-12 * top:
                for there in range(start_M[of_H[here]], start_M[of_H[here] + 1]):
                    other = rank_H[there]
                    if own_R[other] < 0:
                        own_R[other], up_R[other] = there, here
                        queue_R[reached] = other
                        reached += 1
    bound = load / speed
    for i in range(reached - 1, 0, -1):
        rank = queue_R[i]
        lacks = min(bound * speed_R[rank] - rank_load[rank], amount_H[up_R[rank]])
        if lacks > 0.0:
            amount_H[own_R[rank]] += lacks
            amount_H[up_R[rank]] -= lacks
            rank_load[rank] += lacks
            rank_load[rank_H[up_R[rank]]] -= lacks
    return (top - bound) / top if top > 0.0 else 0.0
