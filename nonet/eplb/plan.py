"""Planning: from expert loads and a fleet to a placement, with the imbalance it predicts and a proven lower bound.

Used by the offline tools and by the online balancer; the algorithm is a policy, found by its file's name in
`policies/`. A slot of a dead rank holds no replica: it keeps what `current` names there (else slot % experts).
Legend: N sampled steps, L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nonet import plugins
from nonet.config.fleet import Fleet
from nonet.eplb.bounds import lower_bound, predicted
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError

POLICIES = "nonet.eplb.policies"
DISPATCH = ("even", "waterfill")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What a policy is asked, checked already."""

    load_LE: Floats  # tokens of each expert, mean over the sampled steps
    load_NLE: Floats | None  # the sampled steps, where they were given
    bound_L: Floats  # proven: no placement has a lower imbalance
    fleet: Fleet
    dispatch: str
    current: Placement | None
    max_moves: int | None
    tolerance: float | None
    num_groups: int | None


Policy = Callable[[Problem], npt.NDArray[np.int32]]  # expert_LG


@dataclass(frozen=True)
class Plan:
    """A placement and what to expect of it.

    Imbalance is time of the slowest rank / time if load were spread in proportion to speeds - 1: (max - mean) / mean
    over ranks where speeds are equal. `bound_L` is proven: no placement on this fleet has a lower imbalance.
    """

    placement: Placement
    policy: str
    dispatch: str
    imbalance_L: Floats
    bound_L: Floats
    moves_L: npt.NDArray[np.int64]  # (rank, expert) pairs to load, against `current`; all without one

    @property
    def gap_L(self) -> Floats:
        """[L] imbalance that another placement could at best save."""
        return np.maximum(self.imbalance_L - self.bound_L, 0)


def plan(
    load: npt.ArrayLike,
    fleet: Fleet,
    *,
    policy: str = "nonet",
    dispatch: str = "even",
    current: Placement | None = None,
    max_moves: int | None = None,
    tolerance: float | None = None,
    num_groups: int | None = None,
    threads: int = 1,
) -> Plan:
    """Place experts on a fleet for a load: [L, E] tokens by expert, or sampled steps [N, L, E].

    policy: the name of a file in `policies/`; "default" is nonet. Sampled steps let it keep experts apart that are hot
    in the same steps; the others use their mean, and so does it with a current placement.
    dispatch: the rule that will spread an expert's tokens over its replicas.
    current: plan from this placement; an expert that stays on a rank keeps its slot.
    max_moves: most (rank, expert) pairs to load a layer, a hard cap.
    tolerance: imbalance above the proven bound that is good enough; left out, the policy's own.
    num_groups: groups of consecutive experts of which the router picks few; kept on a node where the fleet has several.
    threads: that share the layers, which are planned independently of each other.
    The result is a function of the other arguments alone: no randomness. Raises ConfigError naming the argument.
    """
    if threads != 1:
        options = dict(
            policy=policy, dispatch=dispatch, max_moves=max_moves, tolerance=tolerance, num_groups=num_groups
        )
        return _shared(load, fleet, current, threads, options)
    name = "nonet" if policy == "default" else policy
    place = _policy(name)
    problem = _problem(load, fleet, dispatch, current, max_moves, tolerance, num_groups)
    placement = Placement(_settle(place(problem), problem), fleet, problem.load_LE.shape[1])
    return Plan(
        placement=placement,
        policy=name,
        dispatch=dispatch,
        imbalance_L=predicted(problem.load_LE, placement, dispatch),
        bound_L=problem.bound_L,
        moves_L=moves(placement, current),
    )


def _shared(
    load: npt.ArrayLike, fleet: Fleet, current: Placement | None, threads: int, options: dict[str, Any]
) -> Plan:
    """As `plan`: every thread plans consecutive layers."""
    samples = np.asarray(load)
    layers = samples.shape[-2] if samples.ndim in (2, 3) else 0
    if not 1 <= threads <= layers:
        raise ConfigError("threads", threads, f"1 to {layers}, the number of layers")

    def part(number: int) -> Plan:
        own = slice(layers * number // threads, layers * (number + 1) // threads)
        given = None if current is None else replace(current, expert_LG=current.expert_LG[own])
        return plan(samples[..., own, :], fleet, current=given, **options)

    try:
        with ThreadPoolExecutor(threads - 1) as pool:
            waiting = [pool.submit(part, number) for number in range(1, threads)]
            plans = [part(0), *(one.result() for one in waiting)]
    except ConfigError:
        return plan(load, fleet, current=current, **options)  # which raises it again, with the layer's own number
    expert_LG = np.concatenate([one.placement.expert_LG for one in plans])
    return replace(
        plans[0],
        placement=replace(plans[0].placement, expert_LG=expert_LG),
        imbalance_L=np.concatenate([one.imbalance_L for one in plans]),
        bound_L=np.concatenate([one.bound_L for one in plans]),
        moves_L=np.concatenate([one.moves_L for one in plans]),
    )


@cache
def _policy(name: str) -> Policy:
    """Found once: listing the folder takes as long as some plans."""
    place: Policy = plugins.load(POLICIES, name, "policy").place
    return place


def moves(placement: Placement, current: Placement | None = None) -> npt.NDArray[np.int64]:
    """[L] (rank, expert) pairs on live ranks that `current` does not have: the experts to load."""
    new_LRE = _held(placement, placement.fleet)
    if current is not None:
        new_LRE &= ~_held(current, placement.fleet)
    return new_LRE.sum((1, 2))


def _held(placement: Placement, fleet: Fleet) -> npt.NDArray[np.bool_]:
    """[L, R, E] whether a rank holds an expert; nothing on dead ranks of `fleet`."""
    held_LRE = np.zeros((placement.num_layers, fleet.num_ranks, placement.num_experts), dtype=bool)
    held_LRE[np.arange(placement.num_layers)[:, None], placement.rank_of_slot(), placement.expert_LG] = True
    held_LRE[:, sorted(fleet.dead_ranks)] = False
    return held_LRE


def _settle(expert_LG: npt.NDArray[np.int32], problem: Problem) -> npt.NDArray[np.int32]:
    """Slots of dead ranks as documented, and experts that stay on their rank in the slot they have."""
    out_LG = np.array(expert_LG, dtype=np.int32)
    first, current = problem.fleet.first_slot, problem.current
    for rank in range(problem.fleet.num_ranks):
        own = slice(first[rank], first[rank + 1])
        if rank in problem.fleet.dead_ranks:
            fill_G = np.arange(first[rank], first[rank + 1]) % problem.load_LE.shape[1]
            out_LG[:, own] = fill_G if current is None else current.expert_LG[:, own]
        elif current is not None:
            for layer in np.flatnonzero((out_LG[:, own] != current.expert_LG[:, own]).any(1)):
                out_LG[layer, own] = _aligned(out_LG[layer, own], current.expert_LG[layer, own])
    return out_LG


def _aligned(new_S: npt.NDArray[np.int32], old_S: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The new experts of a rank, ordered such that as many as possible keep their slot."""
    waiting = list(new_S)
    out = [-1] * len(new_S)
    for slot, expert in enumerate(old_S):
        if expert in waiting:
            out[slot] = expert
            waiting.remove(expert)
    return np.array([expert if expert >= 0 else waiting.pop(0) for expert in out], dtype=np.int32)


def _problem(
    load: npt.ArrayLike,
    fleet: Fleet,
    dispatch: str,
    current: Placement | None,
    max_moves: int | None,
    tolerance: float | None,
    num_groups: int | None,
) -> Problem:
    """The arguments of `plan`, checked and with one dtype."""
    samples = np.array(load, dtype=np.float64, order="C")
    if samples.ndim not in (2, 3) or 0 in samples.shape:
        raise ConfigError(
            "load", samples.shape, "must be [layers, experts] or [steps, layers, experts], none of them 0"
        )
    if not np.isfinite(samples).all() or samples.min() < 0:
        raise ConfigError("load", "NaN, infinite or negative", "tokens are counts: finite and 0 or more")
    if samples.max() > 1e100:
        raise ConfigError("load", float(samples.max()), "too large to calculate with; scale it")
    load_LE = samples if samples.ndim == 2 else samples.sum(0) / len(samples)
    layers, experts = load_LE.shape
    slots = sum(fleet.slots_by_rank[rank] for rank in fleet.live_ranks)
    if slots < experts:
        raise ConfigError("num_slots", slots, f"{experts} experts need at least {experts} slots on live ranks")
    if dispatch not in DISPATCH:
        raise ConfigError("dispatch", dispatch, f"known: {', '.join(DISPATCH)}")
    if current is not None:
        given = (*current.expert_LG.shape, current.num_experts, current.fleet.slots_by_rank)
        wanted = (layers, fleet.num_slots, experts, fleet.slots_by_rank)
        if given != wanted:
            raise ConfigError(
                "current", given[:3], f"must have the layers, slots and experts {wanted[:3]}, rank by rank"
            )
    if max_moves is not None and max_moves < 0:
        raise ConfigError("max_moves", max_moves, "must be 0 or more")
    if max_moves is not None and current is None:
        raise ConfigError("max_moves", max_moves, "counts transfers from a current placement: give `current`")
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError("tolerance", tolerance, "must be 0 or more")
    if num_groups is not None and (num_groups < 1 or experts % num_groups):
        raise ConfigError("num_groups", num_groups, f"must divide {experts} experts")
    steps, bound_L = samples if samples.ndim == 3 else None, lower_bound(load_LE, fleet, dispatch)
    return Problem(load_LE, steps, bound_L, fleet, dispatch, current, max_moves, tolerance, num_groups)
