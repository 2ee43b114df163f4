"""The default policy: near-optimal under an even split, the ranks connected by replicas, few transfers.

A fresh plan replicates and places greedily, then searches. Where sampled steps are given, experts that are hot in the
same steps are then moved apart, which costs a little balance of the mean and saves more in each step. With a current
placement it starts there and stops as soon as the imbalance is good enough. In all, replicas connect the ranks if
there are enough of them, so that a dispatch rule can shift load between any two ranks in each step; where that
contradicts an even split, the dispatch rule that was asked for decides.
Legend: L MoE layers, E experts, R ranks (live, with slots), G global slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.plan import Problem
from nonet.eplb.policies._adapt import adapt, connect, fill_best, rescue, resume, transfers
from nonet.eplb.policies._build import orders, replicate
from nonet.eplb.policies._fresh import Wanted, fresh
from nonet.eplb.policies._nodes import homes
from nonet.eplb.policies._search import improve
from nonet.eplb.policies._state import EMPTY, Floats, Ints, State, components, empty, refill
from nonet.errors import ConfigError

# Imbalance above the proven bound that is good enough under an even split. Of a fresh plan, with 8 slots a rank or
# more; fewer are coarser. Where dispatch splits as it likes, the even split is only where it starts from.
FRESH = {"even": 3.7e-4, "waterfill": 1e-3}
# From a current placement: each transfer costs, and what is gained on the mean load is below what steps differ by.
ADAPTED = {"even": 0.016, "waterfill": 0.05}
# Of a fresh plan that keeps expert groups on a node: below what steps differ by too, and enough to do so.
GROUPED = 0.01
MOST_STEPS = 32  # groups of sampled steps that a fresh plan is refined on


class _Ranks(NamedTuple):
    """What can hold a replica: live ranks that have slots."""

    slot_G: Ints  # the fleet's number of each usable slot, at most E on a rank
    slots_R: Ints
    cost_R: Floats  # 1 / speed
    node_R: Ints  # numbered from 0
    connected: bool  # replicas enough, or nearly, for all ranks to be joined by them


def place(problem: Problem) -> npt.NDArray[np.int32]:
    """expert_LG for any fleet. Raises ConfigError where max_moves is too low to keep every expert alive."""
    ranks = _usable(problem.fleet, problem.load_LE.shape[1])
    load_LE = _scaled(problem)
    out_LG = np.zeros((len(load_LE), problem.fleet.num_slots), dtype=np.int32)
    out_LG[:, ranks.slot_G] = (_fresh if problem.current is None else _from_current)(problem, ranks, load_LE)
    _repeat(out_LG, problem)
    return out_LG


def _fresh(problem: Problem, ranks: _Ranks, load_LE: Floats) -> Ints:
    wanted = Wanted(
        cost_R=ranks.cost_R,
        slots_R=ranks.slots_R,
        node_R=ranks.node_R,
        connected=ranks.connected,
        for_waterfill=problem.dispatch == "waterfill",
        strict=problem.tolerance is not None,
    )
    count_LE = replicate(load_LE, len(ranks.slot_G), len(ranks.slots_R))
    order_LE = orders(load_LE, count_LE, ranks.connected)
    home_LE = np.stack([homes(load_E, ranks.node_R, ranks.slots_R, problem.num_groups) for load_E in load_LE])
    enough_L = 1 + problem.bound_L + _tolerance(problem, ranks)
    return fresh(wanted, load_LE, _grouped(problem), count_LE, order_LE, home_LE, enough_L)


def _from_current(problem: Problem, ranks: _Ranks, load_LE: Floats) -> Ints:
    cap = len(ranks.slot_G) if problem.max_moves is None else problem.max_moves
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    tolerance = _tolerance(problem, ranks)
    rows = []
    for layer, current_G in enumerate(_current(problem)[:, ranks.slot_G]):
        s = empty(load_LE[layer], ranks.cost_R, ranks.slots_R)
        was_RE = resume(s, current_G)
        needed = rescue(s, order_LE[layer])
        if needed > cap:
            remedy = f"layer {layer} needs at least {needed} transfers to keep every expert on a live rank"
            raise ConfigError("max_moves", problem.max_moves, remedy)
        _adapt(s, was_RE, 1 + problem.bound_L[layer], tolerance, cap)
        rows.append(np.where(s.expert_G == EMPTY, current_G, s.expert_G))
    return np.stack(rows)


def _current(problem: Problem) -> npt.NDArray[np.int32]:
    """expert_LG as it is, but on ranks with more slots than experts the repeated ones last."""
    assert problem.current is not None
    out_LG, first = problem.current.expert_LG.astype(np.int32), problem.fleet.first_slot
    for rank, slots in enumerate(problem.fleet.slots_by_rank):
        if slots > problem.load_LE.shape[1]:
            for own_S in out_LG[:, first[rank] : first[rank + 1]]:
                seen = np.sort(np.unique(own_S, return_index=True)[1])
                own_S[:] = np.concatenate([own_S[seen], np.delete(own_S, seen)])
    return out_LG


def _adapt(s: State, was_RE: npt.NDArray[np.bool_], bound: float, tolerance: float, cap: int) -> None:
    """A layer that has a placement, in at most `cap` transfers. `bound`: the least time that is possible."""
    fill_best(s, was_RE, cap - transfers(s, was_RE))
    parts = components(s, np.empty(len(s.expert_G), np.bool_))
    adapt(s, was_RE, bound + tolerance, bound - tolerance / 2, parts, cap)
    if s.expert_G.min() == EMPTY:  # too few transfers for all second replicas on a rank to be replaced
        return
    if s.load_R.max() > bound + tolerance:
        before_G = s.expert_G.copy()
        improve(s, bound + tolerance, parts, max(2, 15 * 32 // len(s.load_R)))
        if transfers(s, was_RE) > cap:
            refill(s, before_G)
    if parts > 1:
        connect(s, was_RE, bound + tolerance, cap, 0.0)


def _scaled(problem: Problem) -> Floats:
    """load_LE such that a perfect spread takes each rank the time 1."""
    speed = sum(problem.fleet.speeds[rank] for rank in problem.fleet.live_ranks)
    total_L1 = problem.load_LE.sum(1, keepdims=True)
    return np.divide(problem.load_LE * speed, total_L1, out=np.zeros_like(problem.load_LE), where=total_L1 > 0)


def _grouped(problem: Problem) -> Floats:
    """[L, N, E] the sampled steps in at most MOST_STEPS groups of neighbours, each layer's mean 1; N = 0: none."""
    load_NLE, (layers, experts) = problem.load_NLE, problem.load_LE.shape
    if load_NLE is None:
        return np.zeros((layers, 0, experts))
    edges = np.arange(min(len(load_NLE), MOST_STEPS) + 1) * len(load_NLE) // min(len(load_NLE), MOST_STEPS)
    groups = np.add.reduceat(load_NLE, edges[:-1], axis=0) / np.diff(edges)[:, None, None]
    total_L1 = problem.load_LE.sum(1, keepdims=True)
    scaled_NLE = np.divide(groups * experts, total_L1, out=np.zeros_like(groups), where=total_L1 > 0)
    return np.ascontiguousarray(scaled_NLE.swapaxes(0, 1))


def _usable(fleet: Fleet, experts: int) -> _Ranks:
    ranks = [rank for rank in fleet.live_ranks if fleet.slots_by_rank[rank]]
    slots_R = np.array([min(fleet.slots_by_rank[rank], experts) for rank in ranks])
    slot_G = np.concatenate([fleet.first_slot[r] + np.arange(n) for r, n in zip(ranks, slots_R, strict=True)])
    nodes = list(dict.fromkeys(fleet.nodes[rank] for rank in ranks))
    return _Ranks(
        slot_G=slot_G,
        slots_R=slots_R,
        cost_R=np.array([1 / fleet.speeds[rank] for rank in ranks]),
        node_R=np.array([nodes.index(fleet.nodes[rank]) for rank in ranks]),
        connected=5 * (len(slot_G) - experts) >= 4 * (len(ranks) - 1),
    )


def _tolerance(problem: Problem, ranks: _Ranks) -> float:
    if problem.tolerance is not None:
        return problem.tolerance
    if problem.num_groups is not None and ranks.node_R.any() and problem.current is None:
        return GROUPED
    slots_a_rank = len(ranks.slot_G) / len(ranks.slots_R)
    fresh = FRESH[problem.dispatch] * max(1.0, 7 / max(slots_a_rank - 1, 0.5)) ** 1.65
    return fresh if problem.current is None else max(fresh, ADAPTED[problem.dispatch])


def _repeat(out_LG: npt.NDArray[np.int32], problem: Problem) -> None:
    """A rank with more slots than experts holds all of them; its other slots repeat them."""
    experts, first = problem.load_LE.shape[1], problem.fleet.first_slot
    for rank in problem.fleet.live_ranks:
        for g in range(first[rank] + experts, first[rank + 1]):
            out_LG[:, g] = out_LG[:, g - experts]
