"""What no placement can beat, proven, and what a given placement reaches. Read by the planner and the advisor.

A rank's time is its tokens / its speed; imbalance is the slowest time / the time of a perfect spread - 1, so that it is
(max - mean) / mean over ranks of equal speed. Ranks without slots have no work but count in the perfect spread; dead
ranks do not. Rounding is taken off a bound, never added.
Legend: L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.eplb.policies._flow import best_split
from nonet.eplb.policies._jit import jit
from nonet.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def lower_bound(load_LE: npt.ArrayLike, fleet: Fleet, dispatch: str = "even") -> Floats:
    """[L] imbalance that no placement on this fleet can be below, under a dispatch rule ("even", "waterfill").

    The largest of three, each valid for any split of an expert's tokens over its replicas:
    B1: all load over all ranks, where a rank takes at most what as many hottest experts as it has slots have.
    B2: an expert of load w needs hosts whose speeds add up to w / T, so giving replicas to the largest w / (speed of
    as many fastest ranks) finds the least T for the slots there are.
    B3: the n ranks that host the hottest k experts (n <= slots - experts + k) also hold the experts for which the
    other ranks have no slots; T is the least over n of their load / speed.
    """
    if dispatch not in ("even", "waterfill"):
        raise ConfigError("dispatch", dispatch, "known: even, waterfill")
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    live = [rank for rank in fleet.live_ranks if fleet.slots_by_rank[rank]]
    slots = sum(min(fleet.slots_by_rank[rank], load_LE.shape[1]) for rank in live)
    fastest = np.cumsum(sorted((fleet.speeds[rank] for rank in live), reverse=True))
    roomiest = np.cumsum([0, *sorted((fleet.slots_by_rank[rank] for rank in live), reverse=True)])
    speed_R = np.array([fleet.speeds[rank] for rank in live])
    slots_R = np.array([min(fleet.slots_by_rank[rank], load_LE.shape[1]) for rank in live])
    falling_LE = np.ascontiguousarray(np.sort(load_LE, axis=1)[:, ::-1])
    least_L = _least_time(falling_LE, slots, speed_R, slots_R, fastest, roomiest.astype(np.int64)) * (1 - 1e-12)
    return _imbalance(load_LE, least_L, fleet)


def predicted(load_LE: npt.ArrayLike, placement: Placement, dispatch: str = "even") -> Floats:
    """[L] imbalance of a placement: tokens split evenly over slots, or (waterfill) split as well as can be."""
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    fleet, rows_LG = placement.fleet, placement.expert_LG
    speed_R = np.array(fleet.speeds)
    rank_G = placement.rank_of_slot()
    rank_G[np.isin(rank_G, sorted(fleet.dead_ranks))] = -1
    if dispatch == "waterfill":
        pairs = zip(load_LE, rows_LG, strict=True)
        tokens_LG = np.stack([best_split(load_E, expert_G, rank_G, speed_R) for load_E, expert_G in pairs])
    else:
        layer_LG = np.arange(len(load_LE))[:, None]
        live = rank_G >= 0
        at_LG = (layer_LG * load_LE.shape[1] + rows_LG)[:, live]
        count_LE = np.bincount(at_LG.ravel(), minlength=load_LE.size).reshape(load_LE.shape)
        tokens_LG = np.where(live, (load_LE / np.maximum(count_LE, 1))[layer_LG, rows_LG], 0.0)
    bounds_R = [first for first, slots in zip(fleet.first_slot, fleet.slots_by_rank, strict=False) if slots]
    has_slots = np.array(fleet.slots_by_rank) > 0
    slowest_L = (np.add.reduceat(tokens_LG, bounds_R, axis=1) / speed_R[has_slots]).max(1)
    return _imbalance(load_LE, slowest_L, fleet)


def _imbalance(load_LE: Floats, slowest_L: Floats, fleet: Fleet) -> Floats:
    perfect_L = load_LE.sum(1) / sum(fleet.speeds[rank] for rank in fleet.live_ranks)
    excess_L = np.maximum(slowest_L - perfect_L, 0)
    return np.divide(excess_L, perfect_L, out=np.zeros_like(perfect_L), where=perfect_L > 0)


@jit
def _least_time(
    load_LE: Floats, slots: int, speed_R: Floats, slots_R: Ints, fastest_R: Floats, roomiest_R: Ints
) -> Floats:
    """[L] the largest of B1, B2 and B3; loads in falling order.

    fastest_R, roomiest_R: speed (slots) of the 1.. (0..) best ranks together.
    """
    layers, experts = load_LE.shape
    ranks = len(fastest_R)
    out_L = np.zeros(layers)
    for layer in range(layers):
        load_E = load_LE[layer]
        hot_E = np.zeros(experts + 1)  # load of the hottest 0, 1, 2... experts
        cold_E = np.zeros(experts + 1)
        for k in range(experts):
            hot_E[k + 1] = hot_E[k] + load_E[k]
            cold_E[k + 1] = cold_E[k] + load_E[experts - 1 - k]
        least = max(_all_over_all(hot_E, speed_R, slots_R), _largest_share(load_E, slots, fastest_R))
        for k in range(1, experts + 1):
            lowest = np.inf
            for n in range(min(ranks, slots - experts + k), 0, -1):
                squeezed = max(0, experts - k - roomiest_R[ranks - n])
                lowest = min(lowest, (hot_E[k] + cold_E[squeezed]) / fastest_R[n - 1])
                if lowest <= least:
                    break
            least = max(least, lowest)
        out_L[layer] = least
    return out_L


@jit
def _all_over_all(hot_E: Floats, speed_R: Floats, slots_R: Ints) -> float:
    """B1: the least T at which the ranks can take all load, each at most T x speed and what its slots can hold."""
    least = 0.0
    for _ in range(len(speed_R)):
        rest, speed = hot_E[-1], 0.0
        for r in range(len(speed_R)):
            if hot_E[slots_R[r]] <= least * speed_R[r]:
                rest -= hot_E[slots_R[r]]
            else:
                speed += speed_R[r]
        if speed == 0 or rest <= least * speed:
            break
        least = rest / speed
    return least


@jit
def _largest_share(load_E: Floats, slots: int, fastest_R: Floats) -> float:
    """B2 of one layer. Replicas beyond the number of ranks do not help."""
    count_E = np.zeros(len(load_E), np.int64)
    share_E = load_E / fastest_R[0]
    for _ in range(len(load_E), slots):
        e = int(np.argmax(share_E))
        if count_E[e] + 1 == len(fastest_R):
            break
        count_E[e] += 1
        share_E[e] = load_E[e] / fastest_R[count_E[e]]
    return float(share_E.max())
