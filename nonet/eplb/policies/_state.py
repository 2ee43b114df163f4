"""One layer being planned: which expert each slot holds, and all that follows from it, kept up to date by two edits.

Used by the builders and searches of the `nonet` policy. Ranks and slots are those that can hold a replica: live ranks,
at most E slots each. An expert's load is split evenly over its replicas; a rank's load is in units of its speed.
Legend: E experts, R ranks, G slots, K places in an expert's list of slots (R of them).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
EMPTY = -1


class State(NamedTuple):
    load_E: Floats  # tokens
    cost_R: Floats  # 1 / speed
    first_R: Ints  # first slot of each rank, and the end
    rank_G: Ints
    expert_G: Ints  # EMPTY where nothing was placed yet
    count_E: Ints  # replicas placed
    slot_EK: npt.NDArray[np.int32]  # the slots of an expert: the first count_E of its row, in no order
    size_E: Floats  # load / replicas: what one replica weighs (before it is placed: with the replicas it will have)
    load_R: Floats
    held_RE: npt.NDArray[np.bool_]


@jit
def empty(load_E: Floats, cost_R: Floats, slots_R: Ints) -> State:
    """No slot filled. The sizes are those of no replicas; whoever fills the slots sets them."""
    ranks, experts = len(slots_R), len(load_E)
    first_R = np.zeros(ranks + 1, np.int64)
    for r in range(ranks):
        first_R[r + 1] = first_R[r] + slots_R[r]
    rank_G = np.empty(first_R[ranks], np.int64)
    for r in range(ranks):
        rank_G[first_R[r] : first_R[r + 1]] = r
    return State(
        load_E,
        cost_R,
        first_R,
        rank_G,
        np.full(first_R[ranks], EMPTY),
        np.zeros(experts, np.int64),
        np.empty((experts, ranks), np.int32),
        load_E.copy(),
        np.zeros(ranks),
        np.zeros((ranks, experts), np.bool_),
    )


@jit
def put(s: State, g: int, e: int) -> None:
    """Expert e into the empty slot g; sizes and loads of ranks stay as they are."""
    s.expert_G[g] = e
    s.slot_EK[e, s.count_E[e]] = g
    s.count_E[e] += 1
    s.held_RE[s.rank_G[g], e] = True


@jit
def take(s: State, g: int) -> None:
    """Empty the slot g; sizes and loads of ranks stay as they are."""
    e = s.expert_G[g]
    s.expert_G[g] = EMPTY
    s.count_E[e] -= 1
    k = 0
    while s.slot_EK[e, k] != g:
        k += 1
    s.slot_EK[e, k] = s.slot_EK[e, s.count_E[e]]
    s.held_RE[s.rank_G[g], e] = False


@jit
def swap(s: State, g: int, h: int) -> None:
    """Exchange the experts of two slots on different ranks, loads included."""
    a, b = s.expert_G[g], s.expert_G[h]
    take(s, g)
    take(s, h)
    put(s, g, b)
    put(s, h, a)
    change = s.size_E[b] - s.size_E[a]
    s.load_R[s.rank_G[g]] += change * s.cost_R[s.rank_G[g]]
    s.load_R[s.rank_G[h]] -= change * s.cost_R[s.rank_G[h]]


@jit
def replace(s: State, g: int, x: int) -> None:
    """Slot g now holds a replica of x, not of what it held: sizes and loads of all ranks concerned follow."""
    y = s.expert_G[g]
    _weigh(s, x, -1.0)
    _weigh(s, y, -1.0)
    take(s, g)
    put(s, g, x)
    s.size_E[x] = s.load_E[x] / s.count_E[x]
    s.size_E[y] = s.load_E[y] / max(s.count_E[y], 1)
    _weigh(s, x, 1.0)
    _weigh(s, y, 1.0)


@jit
def _weigh(s: State, e: int, sign: float) -> None:
    for k in range(s.count_E[e]):
        r = s.rank_G[s.slot_EK[e, k]]
        s.load_R[r] += sign * s.size_E[e] * s.cost_R[r]


@jit
def weigh_all(s: State) -> None:
    """Sizes and loads of ranks from scratch."""
    s.load_R[:] = 0.0
    for e in range(len(s.load_E)):
        s.size_E[e] = s.load_E[e] / max(s.count_E[e], 1)
        _weigh(s, e, 1.0)


@jit
def refill(s: State, expert_G: Ints) -> None:
    """Start again from these experts in the slots."""
    s.held_RE[:] = False
    s.count_E[:] = 0
    for g in range(len(expert_G)):
        put(s, g, expert_G[g])
    weigh_all(s)


@jit
def components(s: State, loose_G: npt.NDArray[np.bool_]) -> int:
    """How many parts the ranks fall into if two ranks are joined by each expert that both hold.

    loose_G becomes true for slots that may lose their expert, all at once, without a further part.
    """
    above_R = np.arange(len(s.load_R))
    for e in range(len(s.load_E)):
        loose_G[s.slot_EK[e, 0]] = s.count_E[e] == 1
        for k in range(1, s.count_E[e]):
            loose_G[s.slot_EK[e, k]] = not join(above_R, s.rank_G[s.slot_EK[e, 0]], s.rank_G[s.slot_EK[e, k]])
    return parts_of(above_R)


@jit
def components_without(s: State, g: int, above_R: Ints) -> int:
    """The parts if slot g were empty; above_R becomes the forest of these parts."""
    above_R[:] = np.arange(len(above_R))
    for e in range(len(s.load_E)):
        if s.count_E[e] > 1:
            k = 1 if s.slot_EK[e, 0] == g else 0
            first = s.rank_G[s.slot_EK[e, k]]
            for i in range(k + 1, s.count_E[e]):
                if s.slot_EK[e, i] != g:
                    join(above_R, first, s.rank_G[s.slot_EK[e, i]])
    return parts_of(above_R)


@jit
def parts_of(above_R: Ints) -> int:
    parts = 0
    for r in range(len(above_R)):
        parts += above_R[r] == r
    return parts


@jit
def join(above_R: Ints, p: int, q: int) -> bool:
    """Whether two ranks were apart in a union-find forest; from now on they belong together."""
    a, b = root(above_R, p), root(above_R, q)
    above_R[a] = b
    return bool(a != b)


@jit
def root(above_R: Ints, r: int) -> int:
    """Whom a rank belongs to in a union-find forest; paths are halved on the way."""
    while above_R[r] != r:
        above_R[r] = above_R[above_R[r]]
        r = above_R[r]
    return r
