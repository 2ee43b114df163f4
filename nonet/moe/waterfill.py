"""Lookups that send tokens where ranks have least to do: water-filling over the replicas of each expert.

`ByStep` splits by what all ranks' tokens chose in this very step, which they tell each other first. `ByAverage` asks
nobody: it splits by a running average that the engine feeds. The rules are `eplb.dispatch`'s; here they meet tensors.
Legend: T own tokens, K top-k, P = T x K pairs, L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nonet.eplb.dispatch import DECAY, Replicas, WaterFill, own_quota, quotas, slot_tokens
from nonet.eplb.placement import Placement
from nonet.eplb.quota import stride
from nonet.moe.base import All2All
from nonet.moe.lookup import EvenLookups, Lookup, Lookups, turns

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_stride = lru_cache(1 << 16)(stride)


def lookups(rule: str, placement: Placement, rank: int, device: torch.device, all2all: All2All) -> Lookups:
    """For a value of the setting `replica_dispatch`."""
    match rule:
        case "waterfill":
            return ByStepLookups(placement, rank, all2all.gather_counts)
        case "waterfill-average":
            return ByAverageLookups(placement, rank)
        case _:
            return EvenLookups(placement, rank, device)


class ByStepLookups:
    """Every layer for itself. `gather` gives all ranks' counts [R, E] for this rank's [E]; all ranks enter it."""

    learns = False

    def __init__(self, placement: Placement, rank: int, gather: Callable[[Tensor], Tensor]) -> None:
        self._each = [ByStep(placement.layer(layer), rank, gather) for layer in range(placement.num_layers)]

    def of(self, layer: int) -> Lookup:
        return self._each[layer]

    def learn(self, count_LE: Ints) -> None:
        raise AssertionError("nothing is learned")


class ByStep:
    """One layer: shares for this step's counts, then whole tokens by source rank and slot, the same on all ranks."""

    def __init__(self, placement: Placement, rank: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.rank, self._gather = rank, gather
        self._fill = WaterFill(placement)

    def __call__(self, expert_TK: Tensor) -> Tensor:
        replicas = self._fill.replicas
        count_RE = self._gather(_counts(expert_TK, replicas)).numpy()
        total_1E = count_RE.sum(axis=0, keepdims=True)
        tokens_1G = slot_tokens(total_1E, self._fill.solve(total_1E), replicas)
        return spread(expert_TK, quotas(count_RE, tokens_1G[0], replicas, 0, rank=self.rank), replicas)


class ByAverageLookups:
    """All layers share one running average of the load, kept here."""

    learns = True

    def __init__(self, placement: Placement, rank: int) -> None:
        self._fill = WaterFill(placement)
        self._load_LE = np.zeros((placement.num_layers, placement.num_experts))
        share_LG = self._fill.share_LG
        layers = range(placement.num_layers)
        self._each = [ByAverage(placement.layer(layer), share_LG[layer], rank) for layer in layers]

    def of(self, layer: int) -> Lookup:
        return self._each[layer]

    def learn(self, count_LE: Ints) -> None:
        self._load_LE = DECAY * self._load_LE + (1 - DECAY) * count_LE
        for lookup, share_G in zip(self._each, self._fill.solve(self._load_LE), strict=True):
            lookup.share_G = share_G


class ByAverage:
    """One layer: this rank's own tokens by shares that all ranks know."""

    def __init__(self, placement: Placement, share_G: Floats, rank: int) -> None:
        self.rank, self.share_G, self._replicas = rank, share_G, Replicas.of(placement)

    def __call__(self, expert_TK: Tensor) -> Tensor:
        count_E = _counts(expert_TK, self._replicas).cpu().numpy()
        return spread(expert_TK, own_quota(count_E, self.share_G, self._replicas, 0, self.rank), self._replicas)


def _counts(expert_TK: Tensor, replicas: Replicas) -> Tensor:
    """int64 [E], on the tokens' device."""
    return torch.bincount(expert_TK.reshape(-1), minlength=replicas.count_LE.shape[1])


def spread(expert_TK: Tensor, quota_G: Ints, replicas: Replicas) -> Tensor:
    """Global slots, int64 [T, K]: each slot gets exactly its quota. Specified by `eplb.quota.assign`.

    `replicas` is of one layer; there must be as many pairs of each expert as its slots' quotas add up to.
    """
    order_G, replicas_E = replicas.order_LG[0], replicas.count_LE[0]
    if expert_TK.device.type == "cpu":
        from nonet.kernels.cpu import routing

        return routing.spread(expert_TK, quota_G, order_G, replicas_E)
    return spread_reference(expert_TK, quota_G, order_G, replicas_E)


def spread_reference(expert_TK: Tensor, quota_G: Ints, order_G: Ints, replicas_E: Ints) -> Tensor:
    """On any device, without reading it on the host."""
    in_order_G = quota_G[order_G]
    pairs_E = np.add.reduceat(in_order_G, np.cumsum(replicas_E) - replicas_E)
    step_E = np.ones(len(pairs_E), np.int64)
    for expert in np.flatnonzero(replicas_E > 1):
        step_E[expert] = _stride(int(pairs_E[expert]))
    begin_E, end_G = np.cumsum(pairs_E) - pairs_E, np.cumsum(in_order_G)
    tables = begin_E, np.maximum(pairs_E, 1), step_E, end_G, order_G
    begin, pairs, step, end, order = (torch.from_numpy(table).to(expert_TK.device) for table in tables)
    flat = expert_TK.reshape(-1)
    place = begin[flat] + turns(flat, len(pairs_E)) * step[flat] % pairs[flat]
    return order[torch.searchsorted(end, place, right=True)].view_as(expert_TK)
