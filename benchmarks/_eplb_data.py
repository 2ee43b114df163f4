"""Real counts and placements, from a folder that is not part of the project (`--data`).

`fiddler_mixtral_popularity/*.json`: tokens by expert of Mixtral-8x7B (32 layers, 8 experts) for seven subjects, two
checkpoints. `omni_infer_placement/*.npy`: deployed placements of DeepSeek-V3, 0/1 [ranks, layers, experts].
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from _eplb_rows import Row

from nonet.config.fleet import Fleet
from nonet.eplb.dispatch import Replicas, WaterFill, rank_load
from nonet.eplb.load import imbalance
from nonet.eplb.placement import Placement
from nonet.eplb.plan import plan
from nonet.errors import ConfigError


def real(folder: Path) -> list[Row]:
    """Raises ConfigError if the folder has neither kind of file."""
    rows = [*_mixtral(folder / "fiddler_mixtral_popularity"), *_placements(folder / "omni_infer_placement")]
    if not rows:
        raise ConfigError("--data", str(folder), "holds no fiddler_mixtral_popularity and no omni_infer_placement")
    return rows


def _mixtral(folder: Path) -> list[Row]:
    """Plan on all subjects but one, judge on that one: what a change of subject costs."""
    rows = []
    for checkpoint in ("instruct", "original"):
        paths = sorted(folder.glob(f"{checkpoint}__*.json"))
        if len(paths) < 2:
            continue
        loads = np.array([json.loads(path.read_text())["expert_popularity"] for path in paths], dtype=np.float64)
        for ranks, slots in ((4, 12), (8, 16)):
            fleet = Fleet.even(ranks, slots)
            found: dict[str, list[float]] = {}
            for out in range(len(loads)):
                rest = np.delete(loads, out, axis=0).mean(axis=0)
                for policy in ("deepseek", "trtllm", "nonet"):
                    placement = plan(rest, fleet, policy=policy).placement
                    seen = imbalance(rank_load(loads[out], placement)).mean()
                    found.setdefault(f"{policy}, even", []).append(float(seen))
                for policy in ("deepseek", "nonet"):
                    placement = plan(rest, fleet, policy=policy, dispatch="waterfill").placement
                    share_LG = WaterFill(placement).solve(loads[out], None)
                    seen = imbalance(rank_load(loads[out], placement, share_LG)).mean()
                    found.setdefault(f"{policy}, waterfill", []).append(float(seen))
            own, theirs = np.mean(found["nonet, waterfill"]), np.mean(found["deepseek, even"])
            rows += [Row("data", f"Mixtral {checkpoint}, {ranks}/{slots}, unseen subject: {n}", float(np.mean(v)))
                     for n, v in found.items()]  # fmt: skip
            rows.append(
                Row("data", f"Mixtral {checkpoint}, {ranks}/{slots}: waterfill / DeepSeek's rule", float(own / theirs))
            )
    return rows


def _placements(folder: Path) -> list[Row]:
    """Deployed maps: into how many parts their replica graphs fall, and a plan of ours with the same slots."""
    rows = []
    for path in sorted(folder.glob("*.npy")):
        map_RLE = np.load(path, allow_pickle=False)
        ranks, layers, experts = map_RLE.shape
        parts, own_parts, redundant = [], [], []
        for layer in range(layers):
            slots_R = map_RLE[:, layer].sum(axis=1)
            row = np.concatenate([np.flatnonzero(held) for held in map_RLE[:, layer]]).astype(np.int32)
            fleet = Fleet(tuple(map(int, slots_R)))
            redundant.append(len(row) - experts)
            parts.append(Replicas.of(Placement(row[None], fleet, experts)).components()[0])
            copies = np.bincount(row, minlength=experts).astype(np.float64)  # a load that their counts would suit
            made = plan(copies[None], fleet, dispatch="waterfill").placement
            own_parts.append(Replicas.of(made).components()[0])
        what = f"deployed map, {ranks} ranks, {np.mean(redundant):.1f} spare slots a layer"
        rows.append(Row("data", f"{what}: parts of the replica graph", float(np.mean(parts))))
        rows.append(Row("data", f"{what}: parts with our plan on the same slots", float(np.mean(own_parts))))
    return rows
