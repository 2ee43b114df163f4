"""The node term of the `nonet` policy: less traffic between nodes, at no more imbalance than is good enough.

Two things keep tokens on a node: replicas of an expert on different nodes, as dispatch prefers the nearest one; and,
where the router picks few groups of experts for a token, the experts of a group on one node. Exchanges of experts
between nodes raise the sum of both: the load that finds its expert on any node it comes from, and the load that lies
on the home node of its group. Unlike a rule that groups must stay on nodes, this costs no more balance than allowed.
Legend: E experts, M nodes, R ranks, G slots, U expert groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._search import Bools
from nonet.eplb.policies._state import Floats, Ints, State, components, swap

LEAST_GAIN = 1e-6  # of the whole load, for an exchange to be made


class Nodes(NamedTuple):
    node_R: Ints
    home_E: Ints  # the node of an expert's group; -1 where groups do not matter
    held_EM: Ints  # replicas of an expert on a node


def homes(load_E: Floats, node_R: Ints, slots_R: Ints, num_groups: int | None) -> Ints:
    """home_E: groups of consecutive experts to nodes, the hottest first to the node with least load and room left;
    -1 without groups."""
    if num_groups is None:
        return np.full(len(load_E), -1)
    room_M = np.bincount(node_R, weights=slots_R)
    load_M = np.zeros(len(room_M))
    load_U = load_E.reshape(num_groups, -1).sum(1)
    members = len(load_E) // num_groups
    home_U = np.zeros(num_groups, np.int64)
    for group in np.argsort(-load_U, kind="stable"):
        fits = room_M >= members if (room_M >= members).any() else room_M == room_M.max()
        home_U[group] = np.argmin(np.where(fits, load_M, np.inf))
        load_M[home_U[group]] += load_U[group]
        room_M[home_U[group]] -= members
    return np.repeat(home_U, members)


@jit
def gather(s: State, node_R: Ints, home_E: Ints, keep_parts: bool, enough: float, most_sweeps: int) -> int:
    """Exchange experts between nodes until nothing helps; the exchanges made.

    No rank gets slower than `enough`, or than the slower of the two was; keep_parts: the ranks do not fall into more
    parts.
    """
    held_EM = np.zeros((len(s.load_E), node_R.max() + 1), np.int64)
    for g in range(len(s.expert_G)):
        held_EM[s.expert_G[g], node_R[s.rank_G[g]]] += 1
    nodes = Nodes(node_R, home_E, held_EM)
    loose_G: Bools = np.ones(len(s.expert_G), np.bool_)
    if keep_parts:
        components(s, loose_G)
    made = 0
    for _ in range(most_sweeps):
        before = made
        for p in range(len(node_R)):
            for q in range(p + 1, len(node_R)):
                if node_R[p] != node_R[q]:
                    made += _exchange(s, p, q, nodes, enough, keep_parts, loose_G)
        if made == before:
            break
    return made


@jit
def _exchange(s: State, p: int, q: int, nodes: Nodes, enough: float, keep_parts: bool, loose_G: Bools) -> int:
    """The best exchange between two ranks, as long as there is one."""
    made, here, there = 0, nodes.node_R[p], nodes.node_R[q]
    while made < len(s.expert_G):
        limit = max(enough, s.load_R[p], s.load_R[q])
        best, best_g, best_h = LEAST_GAIN * len(s.load_R), -1, -1
        for g in range(s.first_R[p], s.first_R[p + 1]):
            a = s.expert_G[g]
            if s.held_RE[q, a] or not loose_G[g]:
                continue
            gain_a = _gain(s, nodes, a, here, there)
            for h in range(s.first_R[q], s.first_R[q + 1]):
                b = s.expert_G[h]
                change = s.size_E[a] - s.size_E[b]
                if s.load_R[p] - change * s.cost_R[p] > limit or s.load_R[q] + change * s.cost_R[q] > limit:
                    continue
                gain = gain_a + _gain(s, nodes, b, there, here)
                if gain > best and loose_G[h] and not s.held_RE[p, b]:
                    best, best_g, best_h = gain, g, h
        if best_g < 0:
            break
        a, b = s.expert_G[best_g], s.expert_G[best_h]
        nodes.held_EM[a, here] -= 1
        nodes.held_EM[a, there] += 1
        nodes.held_EM[b, there] -= 1
        nodes.held_EM[b, here] += 1
        swap(s, best_g, best_h)
        made += 1
        if keep_parts:
            components(s, loose_G)
    return made


@jit
def _gain(s: State, nodes: Nodes, e: int, old: int, new: int) -> float:
    """The load that moving a replica of e between nodes adds to what lies right."""
    covered = int(nodes.held_EM[e, new] == 0) - int(nodes.held_EM[e, old] == 1)
    home = int(nodes.home_E[e] == new) - int(nodes.home_E[e] == old)
    return covered * s.load_E[e] / nodes.held_EM.shape[1] + home * s.size_E[e]
