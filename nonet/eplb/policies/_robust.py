"""Refinement on sampled steps, for the `nonet` policy: experts that are hot together go to different ranks.

The mean says nothing of how loads move. Here exchanges of two experts lower the sum over steps and ranks of load
squared, which is the balance of the mean plus the variance of the ranks, correlations included. With the products
of all experts' loads over the steps known, an exchange costs no look at the steps.
Legend: N steps, E experts, F the same, R ranks, G slots.
"""

from __future__ import annotations

import numpy as np

from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._search import Bools
from nonet.eplb.policies._state import Floats, Ints, State, components, swap

LEAST_GAIN = 1e-9  # of the sum of squares, for an exchange to be made


@jit
def refine(s: State, load_NE: Floats, keep_parts: bool, most_sweeps: int) -> int:
    """Exchange experts between all pairs of ranks until nothing helps; the exchanges made.

    keep_parts: no exchange may leave the ranks in more parts than they are.
    """
    product_EF = _products(load_NE, s.count_E)
    on_RE = np.zeros(s.held_RE.shape)  # sum over steps of a rank's load x one replica of an expert
    for g in range(len(s.expert_G)):
        on_RE[s.rank_G[g]] += product_EF[s.expert_G[g]]
    least = 0.0
    for g in range(len(s.expert_G)):
        least += LEAST_GAIN * on_RE[s.rank_G[g], s.expert_G[g]]
    loose_G: Bools = np.ones(len(s.expert_G), np.bool_)
    if keep_parts:
        components(s, loose_G)
    made = 0
    for _ in range(most_sweeps):
        before = made
        for p in range(len(s.load_R)):
            for q in range(p + 1, len(s.load_R)):
                made += _exchange(s, p, q, product_EF, on_RE, loose_G, keep_parts, least)
        if made == before:
            break
    return made


@jit
def _products(load_NE: Floats, count_E: Ints) -> Floats:
    """[E, F] sum over steps of the loads of a replica of each."""
    experts = load_NE.shape[1]
    product_EF = np.zeros((experts, experts))
    for n in range(len(load_NE)):
        size_E = load_NE[n] / count_E
        for e in range(experts):
            product_EF[e] += size_E[e] * size_E
    return product_EF


@jit
def _exchange(
    s: State, p: int, q: int, product_EF: Floats, on_RE: Floats, loose_G: Bools, keep_parts: bool, least: float
) -> int:
    """The best exchange between two ranks, as long as there is one."""
    made = 0
    weight_p, weight_q = s.cost_R[p] * s.cost_R[p], s.cost_R[q] * s.cost_R[q]
    while True:
        best, best_g, best_h = -least, -1, -1
        for g in range(s.first_R[p], s.first_R[p + 1]):
            a = s.expert_G[g]
            if s.held_RE[q, a] or not loose_G[g]:
                continue
            out_a = weight_q * on_RE[q, a] - weight_p * on_RE[p, a]
            for h in range(s.first_R[q], s.first_R[q + 1]):
                b = s.expert_G[h]
                out_b = weight_p * on_RE[p, b] - weight_q * on_RE[q, b]
                own = product_EF[a, a] + product_EF[b, b] - 2 * product_EF[a, b]
                change = 2 * (out_a + out_b) + (weight_p + weight_q) * own
                if change < best and loose_G[h] and not s.held_RE[p, b]:
                    best, best_g, best_h = change, g, h
        if best_g < 0:
            return made
        a, b = s.expert_G[best_g], s.expert_G[best_h]
        on_RE[p] += product_EF[b] - product_EF[a]
        on_RE[q] += product_EF[a] - product_EF[b]
        swap(s, best_g, best_h)
        made += 1
        if keep_parts and (s.count_E[a] > 1 or s.count_E[b] > 1):
            components(s, loose_G)
