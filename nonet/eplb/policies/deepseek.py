"""DeepSeek's planner (deepseek-ai/EPLB): hierarchical where expert groups divide over nodes, else global.

Groups to nodes, replicas to the hottest experts of a node, replicas to the ranks of a node; each packing gives the
heaviest thing left to the lightest pack with room. Same result as the reference, ties included; it may put two
replicas of an expert on one rank and plans afresh each time.
Legend: L MoE layers, E experts (M: those of a node), R ranks, G global slots, P slots of a node, U expert groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.plan import Problem
from nonet.eplb.policies._jit import jit
from nonet.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def place(problem: Problem) -> npt.NDArray[np.int32]:
    """expert_LG. Raises ConfigError for dead ranks, unequal speeds, slots or nodes, and for a cap on moves."""
    fleet, groups = problem.fleet, problem.num_groups or 1
    if problem.max_moves is not None:
        raise ConfigError("max_moves", problem.max_moves, "deepseek plans afresh and keeps no cap; use nonet")
    if fleet.dead_ranks or len(set(fleet.speeds)) > 1:
        raise ConfigError("policy", "deepseek", "knows no dead ranks and no speeds; use nonet")
    if len(set(fleet.slots_by_rank)) > 1:
        raise ConfigError("num_slots", fleet.num_slots, f"deepseek needs a multiple of {fleet.num_ranks} ranks")
    ranks_by_node = _ranks_by_node(fleet) if groups > 1 else [list(range(fleet.num_ranks))]
    if groups % len(ranks_by_node):  # as the reference
        groups, ranks_by_node = 1, [list(range(fleet.num_ranks))]
    nodes, slots = len(ranks_by_node), fleet.slots_by_rank[0]
    rows_LG = np.stack([_plan(load_E, groups, nodes, fleet.num_ranks, slots) for load_E in problem.load_LE])
    out_LRS = np.empty((len(rows_LG), fleet.num_ranks, slots), dtype=np.int32)
    out_LRS[:, sum(ranks_by_node, [])] = rows_LG.reshape(out_LRS.shape)
    return out_LRS.reshape(rows_LG.shape)


def _ranks_by_node(fleet: Fleet) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for rank, node in enumerate(fleet.nodes):
        found.setdefault(node, []).append(rank)
    sizes = {len(ranks) for ranks in found.values()}
    if len(sizes) > 1:
        raise ConfigError("node_of_rank", sorted(sizes), "deepseek with expert groups needs nodes of equal size")
    return [found[node] for node in sorted(found)]


@jit
def _plan(load_E: Floats, groups: int, nodes: int, ranks: int, slots: int) -> Ints:
    """expert_G of one layer, node after node."""
    experts = len(load_E)
    members, room = experts // groups, experts // nodes
    load_U = np.zeros(groups)
    for e in range(experts):
        load_U[e // members] += load_E[e]
    at_U = _pack(load_U, nodes)
    expert_M = np.empty(experts, np.int64)  # node after node
    for e in range(experts):
        expert_M[at_U[e // members] * members + e % members] = e
    out_G = np.empty(ranks * slots, np.int64)
    width = ranks * slots // nodes
    for node in range(nodes):
        own_M = expert_M[node * room : (node + 1) * room]
        member_P, count_M = _replicate(load_E[own_M], width)
        at_P = _pack(load_E[own_M][member_P] / count_M[member_P], ranks // nodes)
        for p in range(width):
            out_G[node * width + at_P[p]] = own_M[member_P[p]]
    return out_G


@jit
def _pack(load_I: Floats, packs: int) -> Ints:
    """Where each item goes, packs one after the other with as many places each."""
    room = len(load_I) // packs
    if room == 1:
        return np.arange(len(load_I))
    used_P, load_P = np.zeros(packs, np.int64), np.zeros(packs)
    at_I = np.empty(len(load_I), np.int64)
    for i in np.argsort(-load_I, kind="mergesort"):
        best = -1
        for p in range(packs):
            if used_P[p] < room and (best < 0 or load_P[p] < load_P[best]):
                best = p
        at_I[i] = best * room + used_P[best]
        used_P[best] += 1
        load_P[best] += load_I[i]
    return at_I


@jit
def _replicate(load_M: Floats, slots: int) -> tuple[Ints, Ints]:
    """(expert in each slot, replicas of each): further replicas, one by one, to the largest load / replicas."""
    member_P = np.arange(slots)
    count_M = np.ones(len(load_M), np.int64)
    size_M = load_M.copy()
    for p in range(len(load_M), slots):
        m = np.argmax(size_M)
        member_P[p] = m
        count_M[m] += 1
        size_M[m] = load_M[m] / count_M[m]
    return member_P, count_M
