"""Fresh plans of many layers, compiled whole: threads that share the layers do not wait for each other.

Called by the `nonet` policy, which says what is wanted. Legend: L MoE layers, E experts, R ranks, G slots, N groups of
sampled steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nonet.eplb.policies._adapt import connect
from nonet.eplb.policies._build import build
from nonet.eplb.policies._jit import jit
from nonet.eplb.policies._nodes import gather
from nonet.eplb.policies._robust import refine
from nonet.eplb.policies._search import improve
from nonet.eplb.policies._state import Floats, Ints, State, components, empty

MOST_SWEEPS = 10  # of the refinement on sampled steps, and of the node term
MOST_GUARDED = 96  # ranks: with more, a fresh plan for an even split starts connected but is not kept so


class Wanted(NamedTuple):
    """What all layers have in common."""

    cost_R: Floats  # 1 / speed
    slots_R: Ints
    node_R: Ints
    connected: bool  # replicas are to connect the ranks
    for_waterfill: bool  # and that goes before the balance of the mean load under an even split
    strict: bool  # the mean load must be balanced as well as was asked for, also after a refinement on steps


@jit
def fresh(
    wanted: Wanted, load_LE: Floats, steps_LNE: Floats, count_LE: Ints, order_LE: Ints, home_LE: Ints, enough_L: Floats
) -> Ints:
    """expert_LG: greedy, then searched until the slowest rank takes `enough_L`, then refined on steps and for nodes."""
    out_LG = np.empty((len(load_LE), wanted.slots_R.sum()), np.int64)
    for layer in range(len(load_LE)):
        s = empty(load_LE[layer], wanted.cost_R, wanted.slots_R)
        build(s, count_LE[layer], order_LE[layer], wanted.node_R, home_LE[layer], wanted.connected)
        _improve(s, wanted, enough_L[layer])
        if steps_LNE.shape[1] > 1:
            refine(s, steps_LNE[layer], wanted.connected, MOST_SWEEPS)
            if wanted.strict:
                improve(s, enough_L[layer], _parts(s) if wanted.connected else 0, 0)
        if wanted.node_R.max() > 0:
            enough = max(enough_L[layer], s.load_R.max())
            gather(s, wanted.node_R, home_LE[layer], wanted.connected, enough, MOST_SWEEPS)
        out_LG[layer] = s.expert_G
    return out_LG


@jit
def _improve(s: State, wanted: Wanted, enough: float) -> None:
    """From what was placed greedily. Under water-filling, staying connected goes before the balance of the mean load
    under an even split, which then is no more than a way to robust connections."""
    ranks = len(s.load_R)
    keep = wanted.connected and wanted.for_waterfill
    if keep or (wanted.connected and ranks <= MOST_GUARDED):
        improve(s, enough, _parts(s), 15 * 32 * 32 // (ranks * ranks))
    if s.load_R.max() > enough and not keep:
        improve(s, enough, 0, max(2, 30 * 32 // ranks))
    if wanted.connected:
        connect(s, s.held_RE.copy(), enough, len(s.expert_G), 0.0)


@jit
def _parts(s: State) -> int:
    return components(s, np.empty(len(s.expert_G), np.bool_))
