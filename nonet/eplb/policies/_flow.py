"""The best possible split of tokens over the replicas of a placement, exactly, as a flow between ranks.

Used to predict what per-step dispatch can reach. Load flows from a rank above the level T to one below it, along
experts that both ends of each edge hold (breadth first: shortest paths). Where none is reachable, the ranks reached
hold load that cannot leave them, so no split gets below their mean: T rises to it. At the end T is the optimum.
Legend: E experts, R ranks, G global slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ROUNDING = 1e-13  # of the whole load


class Graph(NamedTuple):
    """One layer's replicas, walked from rank to rank."""

    expert_G: npt.NDArray[np.int32]
    rank_G: Ints
    first_R: Ints  # slots of rank r: first_R[r] up to end_R[r]
    end_R: Ints
    head_E: Ints  # the first slot of an expert, and for each slot the next; -1 at the end
    next_G: Ints
    hosts_E: Ints
    # of one search: the ranks reached in order, and for each the slot that gives load and the one on it that takes it
    queue_R: Ints
    from_R: Ints
    to_R: Ints
    reached_R: npt.NDArray[np.bool_]


@jit
def best_split(load_E: Floats, expert_G: npt.NDArray[np.int32], rank_G: Ints, speed_R: Floats) -> Floats:
    """tokens_G: float64 tokens for each slot such that max(tokens of rank / speed) is least.

    rank_G: rank of each slot, ascending, -1 for dead. A second replica on the same rank takes nothing.
    """
    graph = _graph(expert_G, rank_G, len(load_E), len(speed_R))
    tokens_G, load_R = np.zeros(len(expert_G)), np.zeros(len(speed_R))
    total, speed = 0.0, 0.0
    for e in range(len(load_E)):
        total += load_E[e]
        g = graph.head_E[e]
        while g >= 0:
            tokens_G[g] = load_E[e] / graph.hosts_E[e]
            load_R[rank_G[g]] += tokens_G[g]
            g = graph.next_G[g]
    for r in range(len(speed_R)):
        if graph.end_R[r]:
            speed += speed_R[r]
    level, rounding = total / speed, ROUNDING * total
    for source in range(len(speed_R)):
        while load_R[source] - level * speed_R[source] > rounding:
            sink, size = _reach(graph, source, tokens_G, load_R, speed_R, level, rounding)
            if sink >= 0:
                most = min(load_R[source] - level * speed_R[source], level * speed_R[sink] - load_R[sink])
                _push(graph, source, sink, most, tokens_G, load_R)
                continue
            stuck, among = 0.0, 0.0
            for i in range(size):
                stuck += load_R[graph.queue_R[i]]
                among += speed_R[graph.queue_R[i]]
            if stuck / among - level <= ROUNDING * level:
                break
            level = stuck / among
    return tokens_G


@jit
def _reach(
    graph: Graph, source: int, tokens_G: Floats, load_R: Floats, speed_R: Floats, level: float, rounding: float
) -> tuple[int, int]:
    """(the nearest rank below the level that load of `source` can get to, or -1; how many ranks were reached)."""
    graph.reached_R[:] = False
    graph.reached_R[source] = True
    graph.queue_R[0] = source
    size, at = 1, 0
    while at < size:
        r = graph.queue_R[at]
        at += 1
        for g in range(graph.first_R[r], graph.end_R[r]):
            if tokens_G[g] <= 0 or graph.hosts_E[graph.expert_G[g]] == 1:
                continue
            other = graph.head_E[graph.expert_G[g]]
            while other >= 0:
                q = graph.rank_G[other]
                if not graph.reached_R[q]:
                    graph.reached_R[q] = True
                    graph.from_R[q], graph.to_R[q], graph.queue_R[size] = g, other, q
                    size += 1
                    if level * speed_R[q] - load_R[q] > rounding:
                        return q, size
                other = graph.next_G[other]
    return -1, size


@jit
def _push(graph: Graph, source: int, sink: int, most: float, tokens_G: Floats, load_R: Floats) -> None:
    """Move load along the path found, as much as `most` and the slots on the way allow."""
    amount, q = most, sink
    while q != source:
        amount = min(amount, tokens_G[graph.from_R[q]])
        q = graph.rank_G[graph.from_R[q]]
    load_R[sink] += amount
    load_R[source] -= amount
    q = sink
    while q != source:
        tokens_G[graph.to_R[q]] += amount
        tokens_G[graph.from_R[q]] -= amount
        q = graph.rank_G[graph.from_R[q]]


@jit
def _graph(expert_G: npt.NDArray[np.int32], rank_G: Ints, experts: int, ranks: int) -> Graph:
    """An expert's list has one slot for each rank that holds it."""
    next_G = np.full(len(expert_G), -1)
    head_E = np.full(experts, -1)
    hosts_E = np.zeros(experts, np.int64)
    first_R, end_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for g in range(len(expert_G) - 1, -1, -1):
        e, r = expert_G[g], rank_G[g]
        if r < 0:
            continue
        first_R[r] = g
        end_R[r] = max(end_R[r], g + 1)
        if head_E[e] < 0 or rank_G[head_E[e]] != r:
            next_G[g], head_E[e] = head_E[e], g
            hosts_E[e] += 1
    none_R = np.zeros(ranks, np.int64)
    reached_R = np.zeros(ranks, np.bool_)
    return Graph(
        expert_G, rank_G, first_R, end_R, head_E, next_G, hosts_E, none_R, none_R.copy(), none_R.copy(), reached_R
    )
