"""Advice: the least number of slots for a wanted imbalance, by layer and in all, with a proof and its price.

Bounds say from where on it can succeed at all, plans say that it does, and the count before the answer is planned too.
Used by `nonet eplb advise`. Knows no files.
Legend: L MoE layers, E experts, R ranks, S slots over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.bounds import lower_bound
from nonet.eplb.plan import Plan, plan
from nonet.errors import ConfigError

Floats = npt.NDArray[np.float64]

MakeFleet = Callable[[int], Fleet]
_ROUNDING = 1e-9  # what a planned imbalance may be above a target for floats' sake


@dataclass(frozen=True)
class Attempt:
    """A plan with so many slots. Imbalances are means over layers."""

    plan: Plan

    @property
    def slots(self) -> int:
        return self.plan.placement.fleet.num_slots

    @property
    def imbalance(self) -> float:
        return float(self.plan.imbalance_L.mean())

    @property
    def bound(self) -> float:
        return float(self.plan.bound_L.mean())

    def reaches(self, target: float) -> bool:
        return self.imbalance <= target + _ROUNDING


@dataclass(frozen=True)
class Advice:
    """`least` reaches the target and `below`, with one slot less, does not; None where no slot can be spared.

    `whole` is the first that reaches it with as many slots on every rank. `by_rank` are the attempts with whole slots a
    rank that were made on the way, least first; `layer_slots_L` the first of them that serves a layer by itself (0:
    none). `threshold`: from so many slots on, replicas can connect all ranks, and water-filling can level every step.
    """

    target: float
    least: Attempt
    below: Attempt | None
    whole: Attempt
    by_rank: list[Attempt]
    layer_slots_L: npt.NDArray[np.int64]
    threshold: int

    @property
    def proven(self) -> bool:
        """No planner could do with fewer slots."""
        return self.below is None or self.below.bound > self.target + _ROUNDING


def advise(
    load_LE: npt.ArrayLike,
    make_fleet: MakeFleet,
    num_ranks: int,
    target: float,
    *,
    dispatch: str = "even",
    policy: str = "nonet",
    most_slots: int | None = None,
) -> Advice:
    """Least slots for a mean imbalance (over layers) of at most `target`, of a mean load [L, E] (or steps [N, L, E]).

    make_fleet: the fleet with so many slots. most_slots: where to give up (default: 4 times what the experts need).
    Raises ConfigError where the target is out of reach.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    mean_LE = load.mean(axis=0) if load.ndim == 3 else load
    experts = mean_LE.shape[1]
    if not 0 <= target < np.inf:
        raise ConfigError("imbalance", target, "(max - mean) / mean is 0 or more")
    fewest = max(experts, num_ranks)
    limit = most_slots or 4 * -(-fewest // num_ranks) * num_ranks
    if limit < fewest:
        raise ConfigError("most_slots", limit, f"{experts} experts on {num_ranks} ranks need {fewest} or more")

    def attempt(slots: int) -> Attempt:
        return Attempt(plan(load, make_fleet(slots), policy=policy, dispatch=dispatch))

    first = _first(lambda slots: _bound(mean_LE, make_fleet(slots), dispatch) <= target + _ROUNDING, fewest, limit)
    by_rank: list[Attempt] = []
    for own in range(-(-fewest // num_ranks), limit // num_ranks + 1):
        if first is None or own * num_ranks < first:
            continue  # a bound forbids it
        by_rank.append(attempt(own * num_ranks))
        if by_rank[-1].reaches(target):
            break
    if not by_rank or not by_rank[-1].reaches(target):
        best = min((a.imbalance for a in by_rank), default=None)
        reached = f"planned {best:.4f}" if best is not None else f"no placement with {limit} slots can"
        raise ConfigError(
            "imbalance", target, f"out of reach with {limit} slots ({reached}); allow more, or a higher one"
        )
    whole = by_rank[-1]
    start = max(fewest, first or fewest, by_rank[-2].slots + 1 if len(by_rank) > 1 else 0)
    least = _descend(attempt, start, whole, target)
    below = attempt(least.slots - 1) if least.slots > fewest else None
    return Advice(target, least, below, whole, by_rank, _layer_slots(by_rank, target), experts + num_ranks - 1)


def _descend(attempt: Callable[[int], Attempt], start: int, reached: Attempt, target: float) -> Attempt:
    """The fewest slots, from `start` on, that reach the target such that one less does not.

    Halving assumes that more slots never hurt; the last steps are then taken one by one.
    """
    low, best = start, reached
    while low < best.slots:
        middle = (low + best.slots) // 2
        tried = attempt(middle)
        if tried.reaches(target):
            best = tried
        else:
            low = middle + 1
    while best.slots > start:
        tried = attempt(best.slots - 1)
        if not tried.reaches(target):
            break
        best = tried
    return best


def _first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number for which something holds that, once it does, goes on to hold; None if it never does."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _bound(load_LE: Floats, fleet: Fleet, dispatch: str) -> float:
    return float(lower_bound(load_LE, fleet, dispatch).mean())


def _layer_slots(attempts: list[Attempt], target: float) -> npt.NDArray[np.int64]:
    """[L] the fewest slots among the attempts that serve each layer; 0 where none does."""
    out_L = np.zeros(len(attempts[0].plan.imbalance_L), np.int64)
    for tried in reversed(attempts):
        out_L[tried.plan.imbalance_L <= target + _ROUNDING] = tried.slots
    return out_L
