"""Replays loads, recorded or made up, through planning policies and dispatch rules, in whole tokens, step by step.

Answers what balance a fleet would have had, from 2 to thousands of ranks, without any rank. Planning looks at the
first steps, the rest is replayed; with `rebalance_every` it plans again from the placement that is there. The `even`
rule is the engine's to the token. Used by `nonet eplb simulate`, the advisor and benchmarks. Knows no files.
Legend: N steps, L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.bounds import lower_bound
from nonet.eplb.dispatch import DECAY, Replicas, WaterFill, rank_load, slot_tokens
from nonet.eplb.load import imbalance
from nonet.eplb.placement import Placement
from nonet.eplb.plan import plan
from nonet.eplb.sources import slot_sums
from nonet.errors import ConfigError, nearest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NO_PLAN = "none"  # the policy that leaves experts in order
RULES = {
    "even": "replicas take turns on each source rank, beginning at its number (the engine's default)",
    "waterfill": "shares for the counts of this step, which all ranks know, as whole tokens",
    "waterfill-average": "shares for the running average of past steps; each source rank rounds by itself",
    "optimal": "shares for the counts of this step, to the end and in fractions: no rule can be below it",
    "hashed": "vLLM's rule: a hash of the token's number picks the replica",
}
MEMORY_STEPS = 128  # planning looks back over so many steps at most


@dataclass(frozen=True)
class Options:
    """How to replay. `samples` shows the planner single steps, not only their mean: better plans that take longer."""

    policy: str = "nonet"
    dispatch: str = "even"
    plan_steps: int = 0  # 0: all steps, which are then replayed too (what a plan could do at best)
    rebalance_every: int = 0  # 0: never again
    max_moves: int | None = None  # a layer and plan, after the first
    samples: bool = True
    sweeps: int = 8
    seed: int = 0

    def check(self, num_steps: int) -> None:
        """Raises ConfigError."""
        if self.dispatch not in RULES:
            raise ConfigError("dispatch", self.dispatch, nearest(self.dispatch, RULES))
        if not 0 <= self.plan_steps < num_steps:
            raise ConfigError(
                "plan_steps", self.plan_steps, f"of {num_steps} steps, 0 to {num_steps - 1} can be planned on"
            )
        if self.rebalance_every < 0:
            raise ConfigError("rebalance_every", self.rebalance_every, "give a number of steps, or 0 for never")
        if self.sweeps < 1:
            raise ConfigError("sweeps", self.sweeps, "must be 1 or more")


@dataclass(frozen=True)
class Simulation:
    """What came out. Imbalance is (max - mean) / mean over ranks, of time where speeds differ."""

    options: Options
    fleet: Fleet
    placement: Placement  # the last one
    imbalance_NL: Floats  # of the replayed steps
    planned_L: Floats  # the first plan's prediction for the load it was made for
    bound_L: Floats  # and the proven lower bound of that
    moves: list[int] = field(default_factory=list)  # (rank, expert) pairs loaded, all layers; an entry a plan
    planner_s: list[float] = field(default_factory=list)  # processor time

    def summary(self) -> dict[str, Any]:
        """Plain numbers; `worst_layer` is an index of L."""
        by_layer_L = self.imbalance_NL.mean(axis=0)
        again = self.moves[1:] or self.moves  # the first plan loads everything
        return {
            "ranks": self.fleet.num_ranks,
            "slots": self.fleet.num_slots,
            "policy": self.options.policy,
            "dispatch": self.options.dispatch,
            "steps": len(self.imbalance_NL),
            "imbalance_mean": float(by_layer_L.mean()),
            "imbalance_p95": float(np.quantile(self.imbalance_NL, 0.95)),
            "imbalance_worst_layer": float(by_layer_L.max()),
            "worst_layer": int(by_layer_L.argmax()),
            "balancedness": float((1 / (1 + self.imbalance_NL)).mean()),
            "planned": float(self.planned_L.mean()),
            "bound": float(self.bound_L.mean()),
            "plans": len(self.planner_s),
            "moves_a_layer_and_plan": float(np.mean(again)) / len(self.planned_L) if again else 0.0,
            "planner_ms": 1e3 * float(np.mean(self.planner_s)) if self.planner_s else 0.0,
        }


def simulate(
    load_NLE: npt.ArrayLike,
    fleet: Fleet,
    options: Options | None = None,
    *,
    load_NRLE: npt.ArrayLike | None = None,
    placement: Placement | None = None,
) -> Simulation:
    """Replay whole tokens [steps, layers, experts] on a fleet.

    load_NRLE: the same by source rank, where that was recorded on as many ranks as the fleet has; else sources are
    drawn. placement: one to begin with, kept unless `rebalance_every` asks for plans. Raises ConfigError.
    """
    options = options or Options()
    load = np.ascontiguousarray(load_NLE, dtype=np.int64)
    if load.ndim != 3 or 0 in load.shape:
        raise ConfigError("load", load.shape, "must be [steps, layers, experts], none of them 0")
    options.check(len(load))
    by_source = None if load_NRLE is None else np.asarray(load_NRLE)
    if by_source is not None and (by_source.shape[1] != fleet.num_ranks or len(by_source) != len(load)):
        raise ConfigError("load", by_source.shape, f"must be of {len(load)} steps and {fleet.num_ranks} source ranks")
    moves: list[int] = []
    seconds: list[float] = []
    first = options.plan_steps
    known_NLE = load[:first] if first else load
    if placement is None:
        placement = _place(known_NLE, fleet, options, None, moves, seconds)
    planned_L, bound_L = _expected(known_NLE.mean(axis=0), placement, _planned_for(options.dispatch))
    rule = _Rule(options, placement, known_NLE)
    out_NL = np.empty((len(load) - first, load.shape[1]))
    for n in range(first, len(load)):
        if options.rebalance_every and n > first and (n - first) % options.rebalance_every == 0:
            recent_NLE = load[max(0, n - MEMORY_STEPS) : n]
            placement = _place(recent_NLE, fleet, options, placement, moves, seconds)
            rule = _Rule(options, placement, recent_NLE)
        load_LR = rule.rank_tokens(load[n], None if by_source is None else by_source[n], n)
        out_NL[n - first] = imbalance(load_LR, fleet)
    return Simulation(options, fleet, placement, out_NL, planned_L, bound_L, moves, seconds)


def _planned_for(dispatch: str) -> str:
    """What a planner calls the rule."""
    return "even" if dispatch in ("even", "hashed") else "waterfill"


def _expected(load_LE: Floats, placement: Placement, dispatch: str) -> tuple[Floats, Floats]:
    """([L] imbalance of a load on a placement, [L] bound of it on any placement)."""
    fleet = placement.fleet
    share_LG = WaterFill(placement).solve(load_LE, None) if dispatch == "waterfill" else None
    return imbalance(rank_load(load_LE, placement, share_LG), fleet), lower_bound(load_LE, fleet, dispatch)


def _place(
    known_NLE: Ints, fleet: Fleet, options: Options, current: Placement | None, moves: list[int], seconds: list[float]
) -> Placement:
    """A plan, its transfers and its time added to what there is."""
    if options.policy == NO_PLAN:
        return Placement.contiguous(known_NLE.shape[1], known_NLE.shape[2], fleet.num_ranks, fleet.num_slots)
    load = known_NLE if options.samples else known_NLE.mean(axis=0)
    rule = _planned_for(options.dispatch)
    _compile(options.policy, rule, options.samples, current is not None)
    begin = time.process_time()
    cap = None if current is None else options.max_moves
    made = plan(load, fleet, policy=options.policy, dispatch=rule, current=current, max_moves=cap)
    seconds.append(time.process_time() - begin)
    moves.append(int(made.moves_L.sum()))
    return made.placement


def _compile(policy: str, dispatch: str, samples: bool, again: bool) -> None:
    """A plan so small that it takes no time, so that the next one is timed without its compilation."""
    fleet, load = Fleet.even(2, 6), np.arange(1.0, 9.0).reshape(2, 1, 4)
    current = Placement.contiguous(1, 4, 2, 6) if again else None
    plan(load if samples else load[0], fleet, policy=policy, dispatch=dispatch, current=current)


class _Rule:
    """A dispatch rule on one placement: tokens of a step in, tokens by rank out."""

    def __init__(self, options: Options, placement: Placement, known_NLE: Ints) -> None:
        self._options = options
        self._fill = WaterFill(placement)
        self._average_LE: Floats = known_NLE.mean(axis=0)
        self._rank_G = placement.rank_of_slot()
        if options.dispatch.startswith("waterfill"):
            self._fill.solve(self._average_LE, 4 * options.sweeps)

    def rank_tokens(self, load_LE: Ints, load_RLE: Ints | None, step: int) -> Floats:
        """[L, R]"""
        replicas, seed = self._fill.replicas, self._options.seed * 1_000_003 + step
        dispatch = self._options.dispatch
        if dispatch == "optimal":
            self._fill.solve(load_LE, None)
            return self._fill.load_LR.copy()
        if dispatch == "waterfill":
            tokens_LG = slot_tokens(load_LE, self._fill.solve(load_LE, self._options.sweeps), replicas)
        elif dispatch == "waterfill-average":
            shares = self._fill.solve(self._average_LE, self._options.sweeps)
            tokens_LG = slot_sums("average", load_LE, replicas, share_LG=shares, count_RLE=load_RLE, seed=seed)
            self._average_LE = DECAY * self._average_LE + (1 - DECAY) * load_LE
        else:
            tokens_LG = slot_sums(dispatch, load_LE, replicas, count_RLE=load_RLE, seed=seed)
        return self._sum(tokens_LG, replicas)

    def _sum(self, tokens_LG: Ints, replicas: Replicas) -> Floats:
        ranks = replicas.placement.fleet.num_ranks
        return np.stack([np.bincount(self._rank_G, weights=row, minlength=ranks) for row in tokens_LG])
