"""Measures of load: how unevenly tokens fall on ranks. Read by statistics, metrics and the demo.

Legend: L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.eplb.placement import Placement


def rank_load(load_LE: npt.NDArray[np.int64], placement: Placement) -> npt.NDArray[np.float64]:
    """[L, R] tokens per rank if an expert's tokens are shared evenly among its replicas."""
    ranks = placement.rank_of_slot()
    out = np.zeros((placement.num_layers, placement.fleet.num_ranks))
    for layer, row in enumerate(placement.expert_LG):
        count = np.bincount(row, minlength=placement.num_experts)
        out[layer] = np.bincount(ranks, weights=load_LE[layer, row] / count[row], minlength=placement.fleet.num_ranks)
    return out


def imbalance(load_LR: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[L] (max - mean) / mean over ranks; 0 where a layer saw no tokens."""
    mean = load_LR.mean(axis=-1)
    excess = load_LR.max(axis=-1) - mean
    return np.divide(excess, mean, out=np.zeros_like(mean), where=mean > 0)
