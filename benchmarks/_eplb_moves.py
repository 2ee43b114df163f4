"""Goals on planning again (G7): transfers and the next epoch's imbalance, from epoch to epoch of a drifting load.

Eight epochs; each is planned on its own load and judged on the next one's. A transfer is an expert that a rank has to
load. DeepSeek's rule plans afresh each time; with vLLM's alignment inside a rank the transfers are the same.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
from _eplb_plans import SCALE, Shape
from _eplb_rows import Row

from nonet.config.fleet import Fleet
from nonet.eplb import synthetic
from nonet.eplb.dispatch import WaterFill, rank_load
from nonet.eplb.load import imbalance
from nonet.eplb.plan import moves as moves_between
from nonet.eplb.plan import plan

EPOCHS = 8
CAP = 5  # transfers a layer, for the plans that water-filling uses: 2 % of DeepSeek's


def _run(
    loads: list[np.ndarray], fleet: Fleet, policy: str, dispatch: str, **options: object
) -> tuple[float, float, int]:
    """(transfers a layer and plan, imbalance on the next epoch, most transfers of a layer) after the first plan."""
    current, moved, seen, most = None, [], [], 0
    for now, following in zip(loads, loads[1:], strict=False):
        again = {} if current is None or policy != "nonet" else {"current": current, **options}
        made = plan(now, fleet, policy=policy, dispatch=dispatch, **again).placement  # type: ignore[arg-type]
        if current is not None:
            transfers_L = moves_between(made, current)
            moved.append(float(transfers_L.mean()))
            most = max(most, int(transfers_L.max()))
            share_LG = WaterFill(made).solve(following, None) if dispatch == "waterfill" else None
            seen.append(float(imbalance(rank_load(following, made, share_LG)).mean()))
        current = made
    return float(np.mean(moved)), float(np.mean(seen)), most


def rebalancing(seeds: int, shape: Shape) -> list[Row]:
    rows = []
    fleet = Fleet.even(32, 288)
    figures: dict[str, list[tuple[float, float, int]]] = {}
    for seed in range(seeds):
        share_LE = synthetic.popularity("r1like", shape.layers, shape.experts, seed)
        loads = [SCALE * p for p in islice(synthetic.epochs(share_LE, 0.95, seed), EPOCHS + 1)]
        runs = {
            "DeepSeek's rule": ("deepseek", "even", {}),
            "even": ("nonet", "even", {"tolerance": 0.02}),
            "even, default": ("nonet", "even", {}),
            "waterfill": ("nonet", "waterfill", {"max_moves": CAP}),
            "waterfill, default": ("nonet", "waterfill", {}),
            "capped": ("nonet", "even", {"max_moves": 3}),
        }
        for name, (policy, dispatch, options) in runs.items():
            figures.setdefault(name, []).append(_run(loads, fleet, policy, dispatch, **options))
    mean = {name: np.mean([f[:2] for f in found], axis=0) for name, found in figures.items()}
    moved, seen = mean["DeepSeek's rule"]
    rows.append(Row("G7", "32/288 even, default: part of DeepSeek's transfers", mean["even, default"][0] / moved, 0.07))
    rows.append(
        Row("G7", "32/288 even, default: next epoch's imbalance / DeepSeek's", mean["even, default"][1] / seen, 1.05)
    )
    rows.append(Row("G7", "32/288 even, tolerance 2 %: part of DeepSeek's transfers", mean["even"][0] / moved))
    rows.append(Row("G7", "32/288 even, tolerance 2 %: next epoch's imbalance / DeepSeek's", mean["even"][1] / seen))
    rows.append(
        Row("G7", f"32/288 waterfill, cap {CAP}: part of DeepSeek's transfers", mean["waterfill"][0] / moved, 0.02)
    )
    rows.append(
        Row(
            "G7", f"32/288 waterfill, cap {CAP}: next epoch's imbalance / DeepSeek's", mean["waterfill"][1] / seen, 0.20
        )
    )
    rows.append(
        Row("G7", "32/288 waterfill, default: part of DeepSeek's transfers", mean["waterfill, default"][0] / moved)
    )
    rows.append(
        Row(
            "G7", "32/288 waterfill, default: next epoch's imbalance / DeepSeek's", mean["waterfill, default"][1] / seen
        )
    )
    rows.append(Row("G7", "cap of 3 transfers a layer: most made", max(f[2] for f in figures["capped"]), 3, 3))
    rows.append(Row("G7", "32/288 DeepSeek's rule: transfers a layer", moved))
    rows.append(Row("G7", "32/288 DeepSeek's rule: next epoch's imbalance", seen))
    return rows
