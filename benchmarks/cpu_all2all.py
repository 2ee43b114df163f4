"""How long one dispatch and combine takes on the CPU ranks of one host, and shm's advantage over all2allv on gloo.

Each of 4 ranks sends the same number of rows (hidden 512, bfloat16, top-4, one slot on each rank) to every rank. The
backends take turns in one run; the medians and their ratio to shm are printed. Exits 1 if shm is less than
2 times faster than all2allv at 8 rows a peer. Run: python benchmarks/cpu_all2all.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch

from nonet import plugins
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.moe.base import All2All, All2AllSpec
from nonet.testing.cluster import Cluster

RANKS, HIDDEN, TOP_K, SLOTS = 4, 512, 4, 32
ROWS = (8, 128, 1024)  # a peer
REQUIRED = 2.0
BACKENDS = ("shm", "all2allv", "allgather_reducescatter", "naive", "tensor", "local")  # "local" moves nothing


def measure(world: World, rows: int, rounds: int, passes: int) -> dict[str, list[float]]:
    """On each rank: seconds for one dispatch and combine, by backend and round."""
    fleet = Fleet.even(world.size, SLOTS)
    spec = All2AllSpec(world.ep, fleet, TOP_K, HIDDEN, torch.bfloat16, rows, exact=False)
    backends = {name: plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec) for name in BACKENDS}
    generator = torch.Generator().manual_seed(world.rank)
    x_TD = torch.randn((rows, HIDDEN), generator=generator).bfloat16()
    per_rank = SLOTS // world.size
    slot_TK = torch.randint(per_rank, (rows, TOP_K), generator=generator) + torch.arange(TOP_K) * per_rank
    weight_TK = torch.full((rows, TOP_K), 1 / TOP_K)
    out: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(rounds + 1):  # the first warms up
        for name, backend in backends.items():
            world.ep.barrier()
            start = time.perf_counter()
            for _ in range(passes):
                one_pass(backend, x_TD, slot_TK, weight_TK, [rows] * world.size)
            out[name].append((time.perf_counter() - start) / passes)
    return {name: times[1:] for name, times in out.items()}


def one_pass(
    backend: All2All, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, rows: list[int]
) -> torch.Tensor:
    sent = backend.dispatch(x_TD, slot_TK, weight_TK, rows).wait()
    return backend.combine(sent.x_ND, sent).wait()  # the experts are not what is measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each backend; medians are taken over them")
    rounds = parser.parse_args().rounds
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{RANKS} ranks on {cores} cores, torch {torch.__version__}, load average {load:.1f}")
    print(f"hidden {HIDDEN}, bfloat16, top-{TOP_K}; microseconds for dispatch + combine, median of {rounds} rounds")
    print(f"{'rows a peer':>11}" + "".join(f"{name:>26}" for name in BACKENDS))
    ratio = {}
    with Cluster(RANKS, timeout_s=600, comm_timeout_s=60) as cluster:
        for rows in ROWS:
            by_rank = cluster.run(measure, rows, rounds, 20 if rows < 1000 else 5)
            median = {n: statistics.median(map(max, zip(*(r[n] for r in by_rank), strict=True))) for n in BACKENDS}
            ratio[rows] = median["all2allv"] / median["shm"]
            cells = (f"{1e6 * t:,.0f} ({t / median['shm']:.2f}x shm)" for t in median.values())
            print(f"{rows:>11}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print(f"shm is {ratio[8]:.2f}x as fast as all2allv at 8 rows a peer (required: {REQUIRED})")
    return 0 if ratio[8] >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
