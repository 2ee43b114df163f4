"""Goals on single steps, in whole tokens: imbalance by dispatch rule (G4, G5), water-filling itself (G6).

Plans are made on 128 steps and judged on the next 40, with 1,024 (token, expert) pairs a rank, layer and step.
"""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
from _eplb_plans import Shape
from _eplb_rows import Row

from nonet.config.fleet import Fleet
from nonet.eplb import synthetic
from nonet.eplb.bounds import predicted
from nonet.eplb.dispatch import WaterFill, rank_load, slot_tokens
from nonet.eplb.load import imbalance
from nonet.eplb.plan import plan
from nonet.eplb.simulate import Options, simulate
from nonet.eplb.workload import MadeUp

PLAN_STEPS, STEPS = 128, 40


def _reached(load: np.ndarray, fleet: Fleet, policy: str, dispatch: str, seed: int, samples: bool = False) -> float:
    options = Options(policy, dispatch, PLAN_STEPS, samples=samples, seed=seed)
    return float(simulate(load, fleet, options).imbalance_NL.mean())


def steps(seeds: int, shape: Shape) -> list[Row]:
    """G4: a load as uneven and restless as what TensorRT-LLM published for DeepSeek-R1."""
    rows = []
    for ranks, slots, goal in ((32, 288, 0.010), (32, 320, 0.001), (72, 360, 0.005)):
        cases = {
            "nonet, waterfill": ("nonet", "waterfill"),
            "nonet, waterfill from the running average": ("nonet", "waterfill-average"),
            "nonet, even": ("nonet", "even"),
            "nonet, least possible on its placement": ("nonet", "optimal"),
            "no plan": ("none", "even"),
            "DeepSeek's rule, even": ("deepseek", "even"),
            "vLLM's rule (hashed)": ("deepseek", "hashed"),
            "TensorRT-LLM's rule": ("trtllm", "even"),
            "DeepSeek's rule + optimal split of each step": ("deepseek", "optimal"),
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        sampled: list[float] = []
        for seed in range(seeds):
            load, _ = MadeUp("calibrated", PLAN_STEPS + STEPS, shape.layers, shape.experts, seed=seed).steps(ranks)
            sampled.append(_reached(load, Fleet.even(ranks, slots), "nonet", "waterfill", seed, samples=True))
            for name, (policy, dispatch) in cases.items():
                found[name].append(_reached(load, Fleet.even(ranks, slots), policy, dispatch, seed))
        at, own = f"{ranks}/{slots}", np.array(found["nonet, waterfill"])
        rows.append(Row("G4", f"{at} nonet, waterfill, worst seed", own.max(), goal))
        if slots == 288:
            even, optimal = found["DeepSeek's rule, even"], found["DeepSeek's rule + optimal split of each step"]
            rows.append(Row("G4", f"{at} part of DeepSeek's, worst seed", (own / even).max(), 0.10))
            rows.append(Row("G4", f"{at} part of DeepSeek's + optimal split, worst seed", (own / optimal).max(), 0.25))
        rows.append(Row("G4", f"{at} nonet, waterfill, planned on samples, mean", float(np.mean(sampled))))
        rows += [Row("G4", f"{at} {name}, mean", float(np.mean(values))) for name, values in found.items()]
    return rows


def correlated(seeds: int, shape: Shape) -> list[Row]:
    """G5: twelve topics mixed anew in each batch, so that experts rise and fall together."""
    rows = []
    for mixing, goal in (("weak", 0.035), ("strong", 0.055)):
        own, even, optimal, mean_only = [], [], [], []
        for seed in range(seeds):
            moves = f"topics-{mixing}"
            load, _ = MadeUp(
                "calibrated", PLAN_STEPS + STEPS, shape.layers, shape.experts, moves=moves, seed=seed
            ).steps(32)
            fleet = Fleet.even(32, 288)
            own.append(_reached(load, fleet, "nonet", "waterfill", seed, samples=True))
            mean_only.append(_reached(load, fleet, "nonet", "waterfill", seed))
            even.append(_reached(load, fleet, "deepseek", "even", seed))
            optimal.append(_reached(load, fleet, "deepseek", "optimal", seed))
        rows.append(Row("G5", f"32/288 {mixing} mixing, planned on samples, mean of seeds", float(np.mean(own)), goal))
        rows.append(Row("G5", f"32/288 {mixing} mixing, planned on their mean", float(np.mean(mean_only))))
        rows.append(Row("G5", f"32/288 {mixing} mixing, DeepSeek's rule, even", float(np.mean(even))))
        rows.append(Row("G5", f"32/288 {mixing} mixing, DeepSeek's rule + optimal split", float(np.mean(optimal))))
    return rows


def solver(seeds: int, shape: Shape) -> list[Row]:
    """G6: at most 8 warm sweeps, and run to the end against the planner's own exact split (another algorithm)."""
    rows = []
    for ranks, slots, goal in ((32, 288, 10.0), (32, 320, None), (72, 360, 25.0)):
        share_LE = synthetic.popularity("calibrated", shape.layers, shape.experts, 0)
        shares = synthetic.drifting(share_LE, 0.10, 0)
        load = synthetic.tokens(shares, 24, ranks * 1024, 0)
        placement = plan(load[:4].mean(axis=0), Fleet.even(ranks, slots), dispatch="waterfill").placement
        fill, exact = WaterFill(placement), WaterFill(placement)
        solve, round_off, off = [], [], 0.0
        for n, load_LE in enumerate(load):
            begin = time.process_time()
            share_LG = fill.solve(load_LE)
            middle = time.process_time()
            slot_tokens(load_LE, share_LG, fill.replicas)
            end = time.process_time()
            if n >= 4:
                solve.append((middle - begin) / shape.layers)
                round_off.append((end - middle) / shape.layers)
        for load_LE in islice(load, 4, 4 + seeds):
            mine = imbalance(rank_load(load_LE, placement, exact.solve(load_LE, None)))
            off = max(off, float(np.abs((1 + mine) / (1 + predicted(load_LE, placement, "waterfill")) - 1).max()))
        at = f"{ranks}/{slots}"
        rows.append(
            Row(
                "G6",
                f"{at} shares a layer, at most 8 warm sweeps, median",
                1e6 * float(np.median(solve)),
                goal,
                unit="us",
            )
        )
        rows.append(Row("G6", f"{at} rounding to whole tokens a layer", 1e6 * float(np.median(round_off)), unit="us"))
        rows.append(Row("G6", f"{at} run to the end: relative difference to the exact split", off, 1e-6, 1e-6))
    return rows
