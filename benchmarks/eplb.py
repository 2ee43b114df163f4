"""Is the expert load balancer as good as its goals? Beside it the rules of DeepSeek, vLLM and TensorRT-LLM.

G1, G2: mean load against the proven bound. G3: time of a plan. G4, G5: imbalance of single steps by dispatch rule. G6:
time and exactness of water-filling. G7: transfers when planning again. G8: advice. G9: fleets of every kind. Peers'
rules are our own implementations, tested against published vectors. Exits 1 where a required figure (1.5 x the goal)
is missed. Run: python benchmarks/eplb.py [--only G4 --seeds 3 --quick --data FOLDER --json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import _eplb_data as data
import _eplb_moves as moves
import _eplb_plans as plans
import _eplb_steps as steps
from _eplb_rows import Row, text

from nonet.errors import ConfigError

GOALS = ("G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G9")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="goals with commas, as in G1,G4; data is one too")
    parser.add_argument("--seeds", type=int, default=3, help="loads of each kind")
    parser.add_argument("--quick", action="store_true", help="12 layers instead of 58, one seed")
    parser.add_argument("--data", type=Path, help="folder with real counts and placements")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    shape = plans.Shape(layers=12) if arguments.quick else plans.Shape()
    groups: dict[str, Callable[[], list[Row]]] = {
        "G1": lambda: plans.quality(seeds, shape),
        "G2": lambda: plans.few_slots(seeds, shape),
        "G3": lambda: plans.milliseconds(shape, repeats=3),
        "G4": lambda: steps.steps(seeds, shape),
        "G5": lambda: steps.correlated(seeds, shape),
        "G6": lambda: steps.solver(seeds, shape),
        "G7": lambda: moves.rebalancing(seeds, shape),
        "G8": lambda: plans.advice(seeds, shape),
        "G9": lambda: plans.every_fleet(seeds, shape),
    }
    if arguments.data is not None:
        groups["data"] = lambda: data.real(arguments.data)
    wanted = arguments.only.split(",") if arguments.only else list(groups)
    unknown = [name for name in wanted if name not in groups]
    if unknown or seeds < 1:
        parser.error(f"--only {unknown[0]}: known are {', '.join(groups)}" if unknown else "--seeds: 1 or more")
    print(
        f"{shape.layers} layers x {shape.experts} experts, {seeds} seeds, one thread, {platform.processor() or 'cpu'}"
    )
    rows: list[Row] = []
    for name in wanted:
        begin = time.process_time()
        found = groups[name]()
        rows += found
        print(f"\n{text(found)}\n({name}: {time.process_time() - begin:.0f} s of processor time)", flush=True)
    missed = [row for row in rows if row.verdict == "MISSED"]
    judged = [row for row in rows if row.verdict]
    reached = sum(row.verdict == "goal" for row in judged)
    between = len(judged) - reached - len(missed)
    print(f"\n{reached} of {len(judged)} at the goal, {between} within what is required, {len(missed)} missed")
    if arguments.json:
        out = [asdict(row) | {"required": row.limit, "verdict": row.verdict} for row in rows]
        arguments.json.write_text(json.dumps({"layers": shape.layers, "seeds": seeds, "rows": out}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
