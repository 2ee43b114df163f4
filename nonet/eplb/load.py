"""Measures of load: how unevenly tokens fall on ranks. Read by statistics, metrics, the dispatch rules and the demo.

Legend: L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement

Floats = npt.NDArray[np.float64]


def live_slots(placement: Placement) -> npt.NDArray[np.bool_]:
    """[G] whether a slot is on a live rank; what a dead one names is no replica."""
    return ~np.isin(placement.rank_of_slot(), sorted(placement.fleet.dead_ranks))


def even_shares(placement: Placement, layer: int | None = None) -> Floats:
    """[L, G] (of one layer: [G]) part of its expert's tokens for each slot if replicas share evenly; 0 if dead."""
    live_G = live_slots(placement)
    rows = placement.expert_LG if layer is None else placement.expert_LG[layer : layer + 1]
    share_LG = np.zeros(rows.shape)
    for row, share_G in zip(rows, share_LG, strict=True):
        count_E = np.bincount(row[live_G], minlength=placement.num_experts)
        share_G[live_G] = 1.0 / count_E[row[live_G]]
    return share_LG if layer is None else share_LG[0]


def rank_load(load_LE: npt.ArrayLike, placement: Placement, share_LG: Floats | None = None) -> Floats:
    """[L, R] tokens per rank, each slot getting its share of its expert's tokens (without shares: an even part)."""
    load, ranks = np.asarray(load_LE), placement.rank_of_slot()
    share = even_shares(placement) if share_LG is None else share_LG
    out_LR = np.zeros((placement.num_layers, placement.fleet.num_ranks))
    for layer, row in enumerate(placement.expert_LG):
        tokens_G = load[layer, row] * share[layer]
        out_LR[layer] = np.bincount(ranks, weights=tokens_G, minlength=placement.fleet.num_ranks)
    return out_LR


def imbalance(load_LR: Floats, fleet: Fleet | None = None) -> Floats:
    """[...] (max - mean) / mean over the ranks of the last axis; 0 where a layer saw no tokens.

    With a fleet: over its live ranks, and of time (load / speed) against the time if load followed the speeds.
    """
    if fleet is not None and (fleet.dead_ranks or fleet.speed_of_rank):
        live = list(fleet.live_ranks)
        speed_R = np.asarray(fleet.speeds)[live]
        mean = load_LR[..., live].sum(axis=-1) / speed_R.sum()
        most = (load_LR[..., live] / speed_R).max(axis=-1)
    else:
        mean, most = load_LR.mean(axis=-1), load_LR.max(axis=-1)
    return np.divide(most - mean, mean, out=np.zeros_like(mean), where=mean > 0)
