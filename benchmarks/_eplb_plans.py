"""Goals on plans: quality against the bound (G1, G2), planner time (G3), advice (G8), fleets of every kind (G9).

Beside them what DeepSeek's rule (which vLLM and SGLang use too) and TensorRT-LLM's do, in our own implementations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
from _eplb_rows import Row

from nonet.config.fleet import Fleet
from nonet.eplb.advise import advise
from nonet.eplb.plan import Plan, plan
from nonet.eplb.synthetic import popularity

SUITE = {
    "unif20": "uniform:0.2", "r1like": "r1like", "logn0.5": "lognormal:0.5", "logn1.0": "lognormal:1.0",
    "dir1.0": "dirichlet:1.0", "zipf0.6": "zipf:0.6", "zipf0.8": "zipf:0.8", "zipf1.0": "zipf:1.0",
    "zipf1.2": "zipf:1.2", "hot4_40": "hot4:0.4", "pareto1.01": "pareto:1.01",
}  # fmt: skip
SCALE = 1e6  # tokens a layer


@dataclass(frozen=True)
class Shape:
    layers: int = 58
    experts: int = 256


def load_of(name: str, shape: Shape, seed: int) -> np.ndarray:
    return SCALE * popularity(SUITE[name], shape.layers, shape.experts, seed)


def _plans(names: list[str], ranks: int, slots: int, shape: Shape, seed: int, policy: str) -> dict[str, Plan]:
    return {n: plan(load_of(n, shape, seed), Fleet.even(ranks, slots), policy=policy) for n in names}


def quality(seeds: int, shape: Shape) -> list[Row]:
    """G1: every distribution within 0.0005 of the bound; and the suite's excess against DeepSeek's."""
    rows = []
    for ranks, slots in ((32, 288), (32, 320), (36, 288)):
        worst, ratio, theirs, trtllm = ("", -1.0), 0.0, 0.0, 0.0
        for seed in range(seeds):
            ours = _plans(list(SUITE), ranks, slots, shape, seed, "nonet")
            peers = _plans(list(SUITE), ranks, slots, shape, seed, "deepseek")
            trt = _plans(list(SUITE), ranks, slots, shape, seed, "trtllm")
            for name, found in ours.items():
                worst = max(worst, (name, _excess(found)), key=lambda pair: pair[1])
            suite = mean(map(_excess, ours.values())) / mean(map(_excess, peers.values()))
            ratio = max(ratio, suite)
            theirs += mean(map(_excess, peers.values())) / seeds
            trtllm += mean(map(_excess, trt.values())) / seeds
        at = f"{ranks}/{slots}"
        rows.append(Row("G1", f"{at} worst of 11: imbalance - bound ({worst[0]})", worst[1], 0.0005))
        rows.append(Row("G1", f"{at} suite mean, part of DeepSeek's", ratio, 0.07))
        rows.append(Row("G1", f"{at} DeepSeek's rule, suite mean", theirs))
        rows.append(Row("G1", f"{at} TensorRT-LLM's rule, suite mean", trtllm))
    return rows


def few_slots(seeds: int, shape: Shape) -> list[Row]:
    """G2: four and three slots a rank, where packing is hard."""
    rows = []
    cases = [
        (72, 288, ["r1like", "unif20", "logn0.5", "logn1.0", "zipf0.8", "dir1.0", "pareto1.01"], 0.0015),
        (144, 432, ["r1like", "logn1.0", "zipf0.8", "pareto1.01"], 0.005),
    ]
    for ranks, slots, names, goal in cases:
        for name in names:
            ours, theirs = [], []
            for seed in range(seeds):
                ours.append(_excess(_plans([name], ranks, slots, shape, seed, "nonet")[name]))
                theirs.append(_excess(_plans([name], ranks, slots, shape, seed, "deepseek")[name]))
            what = f"{ranks}/{slots} {name}: imbalance - bound (DeepSeek's rule {mean(theirs):.4f})"
            rows.append(Row("G2", what, max(ours), goal))
    return rows


def _excess(found: Plan) -> float:
    return float(found.gap_L.mean())


def milliseconds(shape: Shape, repeats: int) -> list[Row]:
    """G3: processor time of a plan of all layers, one thread; the best of a few, compiled code."""
    rows = []

    def took(name: str, ranks: int, slots: int, policy: str, dispatch: str = "even") -> float:
        load, times = load_of(name, shape, 0), []
        for _ in range(repeats):
            begin = time.process_time()
            plan(load, Fleet.even(ranks, slots), policy=policy, dispatch=dispatch)
            times.append(1e3 * (time.process_time() - begin))
        return min(times)

    took("r1like", 32, 288, "nonet"), took("r1like", 32, 288, "deepseek"), took("r1like", 32, 288, "trtllm")  # compile
    took("r1like", 32, 288, "nonet", "waterfill")
    own = {name: took(name, 32, 288, "nonet") for name in SUITE}
    rows.append(Row("G3", "32/288 even, median of 11", median(own.values()), 15, unit="ms"))
    rows.append(
        Row("G3", f"32/288 even, worst of 11 ({max(own, key=own.__getitem__)})", max(own.values()), 30, unit="ms")
    )
    connected = [took(name, 32, 288, "nonet", "waterfill") for name in SUITE]
    rows.append(Row("G3", "32/288 for waterfill, median of 11", median(connected), 7, unit="ms"))
    rows.append(Row("G3", "32/288 even on 2 threads / on 1, elapsed", _two_threads(shape, repeats), 0.65, unit="x"))
    for ranks, slots in ((72, 288), (72, 360), (144, 432)):
        rows.append(Row("G3", f"{ranks}/{slots} even, r1like", took("r1like", ranks, slots, "nonet"), 50, unit="ms"))
    for policy in ("deepseek", "trtllm"):
        other = [took(name, 32, 288, policy) for name in SUITE]
        rows.append(Row("G3", f"32/288 {policy}'s rule (ours, compiled), median of 11", median(other), unit="ms"))
        rows.append(Row("G3", f"32/288 nonet / {policy}", median(own.values()) / median(other), unit="x"))
    return rows


def _two_threads(shape: Shape, repeats: int) -> float:
    """Elapsed time over the suite, two threads over one, in turn; the median of their ratios."""
    ratios = []
    for name in SUITE:
        load, took = load_of(name, shape, 0), {1: [], 2: []}
        for _ in range(2 * repeats):
            for threads in took:
                begin = time.perf_counter()
                plan(load, Fleet.even(32, 288), threads=threads)
                took[threads].append(time.perf_counter() - begin)
        ratios.append(median(took[2]) / median(took[1]))
    return median(ratios)


def advice(seeds: int, shape: Shape) -> list[Row]:
    """G8: the answer reaches the target and one slot less does not; how often the bound proves that nobody could."""
    wrong = proven = asked = 0
    for seed in range(seeds):
        for name, ranks, target in (
            ("r1like", 32, 0.01),
            ("zipf1.0", 72, 0.3),
            ("logn1.0", 144, 0.1),
            ("hot4_40", 72, 0.2),
        ):
            load = load_of(name, Shape(min(shape.layers, 8), shape.experts), seed)
            found = advise(load, lambda slots, ranks=ranks: Fleet.even(ranks, slots), ranks, target)
            asked += 1
            proven += found.proven
            wrong += not found.least.reaches(target) or (found.below is not None and found.below.reaches(target))
            wrong += found.least.bound > found.least.imbalance + 1e-9 or found.threshold != shape.experts + ranks - 1
    return [
        Row("G8", f"{asked} questions: S misses, or S - 1 does as well", wrong, 0, 0),
        Row("G8", f"{asked} questions: proven that no planner could do with S - 1", proven),
    ]


def every_fleet(seeds: int, shape: Shape) -> list[Row]:
    """G9: any slots and ranks, unequal, of several speeds, some dead: no duplicate, no lost expert, bound kept."""
    rng = np.random.default_rng(0)
    wrong = {"duplicates on a rank": 0, "experts lost": 0, "imbalance below bound": 0, "refused": 0}
    cases = 40 * seeds
    for case in range(cases):
        experts, ranks = int(rng.integers(8, 80)), int(rng.integers(2, 40))
        slots_R = rng.integers(1, max(2, 2 * experts // ranks), ranks)
        slots_R = np.minimum(slots_R, experts)  # more would be duplicates by necessity
        dead = frozenset(map(int, rng.choice(ranks, int(rng.integers(0, 1 + ranks // 4)), replace=False)))
        live = [rank for rank in range(ranks) if rank not in dead]
        while slots_R[live].sum() < experts:
            slots_R[rng.choice(live)] += 1
        speeds = tuple(rng.uniform(0.5, 2, ranks).tolist()) if case % 2 else ()
        fleet = Fleet(tuple(map(int, slots_R)), speed_of_rank=speeds, dead_ranks=dead)
        names = list(SUITE)
        load = SCALE * popularity(SUITE[names[case % len(names)]], 2, experts, case)
        found = plan(load, fleet, dispatch="waterfill" if case % 3 == 0 else "even")
        wrong["imbalance below bound"] += int((found.imbalance_L < found.bound_L - 1e-9).any())
        rank_G = found.placement.rank_of_slot()
        keep_G = ~np.isin(rank_G, sorted(dead))
        for row in found.placement.expert_LG:
            key = row[keep_G].astype(np.int64) * ranks + rank_G[keep_G]
            wrong["duplicates on a rank"] += len(key) - len(np.unique(key))
            wrong["experts lost"] += experts - len(np.unique(row[keep_G]))
    rows = [Row("G9", f"{cases} fleets: {name}", count, 0, 0) for name, count in wrong.items() if name != "refused"]
    ours, theirs = 0.0, 0.0
    for ranks, slots in ((32, 288), (32, 320), (72, 288), (144, 432)):
        for name in SUITE:
            ours += _duplicates(plan(load_of(name, shape, 0), Fleet.even(ranks, slots)))
            theirs += _duplicates(plan(load_of(name, shape, 0), Fleet.even(ranks, slots), policy="deepseek"))
    return [
        *rows,
        Row("G9", "duplicates on a rank, suite on 4 even fleets", ours, 0, 0),
        Row("G9", "the same, DeepSeek's rule", theirs),
    ]


def _duplicates(found: Plan) -> int:
    rank_G, ranks = found.placement.rank_of_slot(), found.placement.fleet.num_ranks
    keys = found.placement.expert_LG.astype(np.int64) * ranks + rank_G
    return sum(len(row) - len(np.unique(row)) for row in keys)
