"""How fast do tokens travel over NVLink? Beside a raw push and pull of the same rows, and NCCL.

Each figure is the median over replays of a CUDA graph of many calls, on the slowest rank. dispatch: push and wait,
after the slot lookup, which is nothing where experts stand in order and else the kernel timed beside; the router is not
counted, nor the sort by slot, which belongs to the experts. combine: a round trip less a dispatch. "link" is what
crosses NVLink a direction and second, "of raw" that against the raw kernel in the same run.
NCCL moves every row to every rank by one all-to-all of equal parts, counts known: no packing, no slots, no sums.
Run on 2 or more GPUs: python benchmarks/gpu_all2all.py [--ranks 2 --hidden 2048 --quick --json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from _gpu import need_gpus

from nonet import plugins
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.moe.all2all._nvlink import Nvlink, Ticket
from nonet.moe.base import All2AllSpec
from nonet.moe.lookup import Even
from nonet.testing.cluster import run_ranks

TOKENS = (1, 8, 32, 128, 512, 4096)
BACKENDS = ("nvlink_low_latency", "nvlink_high_throughput")
WAYS = ("dispatch", "combine")
REQUIRED = {1: 12, 8: 12, 32: 12, 128: 14}  # us, each way
CALLS, REPLAYS = 40, 25


@dataclass(frozen=True)
class Shape:
    """Of the layer: Qwen3-30B-A3B's by default."""

    hidden: int = 2048
    top_k: int = 8
    experts: int = 128


def graph_us(world: World, call: Callable[[], object], calls: int = CALLS) -> float:
    """Microseconds a call, the median of replays on the slowest rank."""
    call()
    torch.cuda.synchronize()
    world.ep.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(REPLAYS):
        world.ep.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return max(world.ep.all_gather_object(statistics.median(times[3:])))


@triton.jit
def _raw(x, peer, to, flags, epoch, arrived, T, D, PUSH: tl.constexpr, BD: tl.constexpr):
    """Rows to the peer, or from it, then a flag each way: what any exchange of so many bytes takes at least."""
    d = tl.arange(0, BD)
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        if PUSH:
            tl.store(peer + t * D + d, tl.load(x + t * D + d, mask=d < D), mask=d < D)
        else:
            tl.store(x + t * D + d, tl.load(peer + t * D + d, mask=d < D), mask=d < D)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        now = tl.load(epoch) + 1
        tl.store(epoch, now)
        tl.atomic_xchg(to, now, sem="release", scope="sys")
        while tl.atomic_add(flags, 0, sem="acquire", scope="sys") < now:
            pass


def raw(world: World, backend: Nvlink, x_TD: torch.Tensor, push: bool) -> float:
    """Microseconds of the raw kernel, rows going to the next rank, by the fastest of some grids."""
    from nonet.comm.symmetric import open_windows

    flag = open_windows(world.ep, 64)
    other = (world.rank + 1) % world.size
    peer = backend._windows.tensor(other, backend._at["y"], x_TD.shape, x_TD.dtype)
    state = [torch.zeros(1, dtype=dtype, device=world.device) for dtype in (torch.int64, torch.int32)]
    flags = [flag.tensor(rank, 0, (1,), torch.int64) for rank in (other, world.rank)]
    T, D = x_TD.shape
    grids = {min(T, programs) for programs in (32, 132, 264, 528)}
    more = {"PUSH": push, "BD": triton.next_power_of_2(D), "num_warps": 8}
    call = lambda programs: _raw[(programs,)](x_TD, peer, *flags, *state, T, D, **more)
    return min(graph_us(world, partial(call, programs)) for programs in sorted(grids))


def nccl(world: World, x_TD: torch.Tensor) -> float:
    """Microseconds of an all-to-all that brings every rank's rows to every rank."""
    given = x_TD.repeat(world.size, 1)
    got = torch.empty_like(given)
    return graph_us(world, lambda: dist.all_to_all_single(got, given, group=world.ep.process_group), calls=10)


def measure(world: World, sizes: tuple[int, int, int], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """On every rank, as many tokens on each; sizes: of `Shape`."""
    shape = Shape(*sizes)
    fleet = Fleet.even(world.size, shape.experts)
    lookup = Even(Placement.contiguous(1, shape.experts, world.size, shape.experts), 0, world.rank, world.device)
    out: list[dict[str, Any]] = []
    for fp8 in (False, True):
        for name in BACKENDS:
            spec = All2AllSpec(
                world.ep, fleet, shape.top_k, shape.hidden, torch.bfloat16, max(tokens), exact=False, fp8=fp8
            )
            backend = plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec)
            for T in tokens:
                out.append({"T": T, "backend": name, "fp8": fp8, **one(world, backend, lookup, shape, T)})
    return out


def one(world: World, backend: Nvlink, lookup: Even, shape: Shape, T: int) -> dict[str, Any]:
    generator = torch.Generator(device=world.device).manual_seed(world.rank)
    random = torch.rand((T, shape.experts), device=world.device, generator=generator)
    expert_TK = random.topk(shape.top_k, dim=1).indices
    weight_TK = torch.rand((T, shape.top_k), device=world.device)
    x_TD = torch.randn((T, shape.hidden), device=world.device, dtype=torch.bfloat16)
    rows = (T,) * world.size
    ticket = lambda: Ticket(rows, x_TD, lookup(expert_TK), weight_TK)

    def dispatch() -> Ticket:
        made = ticket()
        backend.push(made)
        backend.wait()
        return made

    times = {"dispatch": graph_us(world, dispatch)}
    times["round trip"] = graph_us(world, lambda: backend.pull(dispatch()))
    times["combine"] = times["round trip"] - times["dispatch"]
    rank_TK = lookup(expert_TK) // (shape.experts // world.size)
    remote = sum(int((rank_TK == r).any(dim=1).sum()) for r in range(world.size) if r != world.rank)
    row_bytes = shape.hidden * 2
    sent = shape.hidden + shape.hidden // 32 if backend.spec.fp8 else row_bytes
    times["link bytes"] = {"dispatch": remote * sent, "combine": remote * row_bytes}
    if not backend.spec.fp8 and backend.name == BACKENDS[0]:
        times["raw push"], times["raw pull"] = raw(world, backend, x_TD, True), raw(world, backend, x_TD, False)
        times["nccl"] = nccl(world, x_TD)
        slots = shape.experts + 8 * world.size
        other = Even(Placement.contiguous(1, shape.experts, world.size, slots), 0, world.rank, world.device)
        times["lookup"] = graph_us(world, lambda: other(expert_TK))
    backend.check()
    return times


def table(found: list[dict[str, Any]], shape: Shape) -> list[str]:
    """Lines of text. The raw kernels and NCCL are measured once for each T."""
    peers = {row["T"]: row for row in found if "nccl" in row}
    lines = [f"{'T':>5} {'backend':27} {'dispatch':13} {'combine':13} link, GB/s   of raw       NCCL / ours"]
    for row in found:
        T, peer = row["T"], peers[row["T"]]
        raw_rate = [T * shape.hidden * 2 / peer[f"raw {way}"] / 1e3 for way in ("push", "pull")]
        rates = [row["link bytes"][way] / row[way] / 1e3 for way in WAYS]
        beside = [peer["nccl"] / row[way] for way in WAYS]
        name = row["backend"] + (" fp8" if row["fp8"] else "")
        marks = ["" if row[way] <= REQUIRED.get(T, 1e9) else " missed" for way in WAYS]
        times = " ".join(f"{row[way]:6.1f}{mark:7}" for way, mark in zip(WAYS, marks, strict=True))
        shares = " ".join(f"{ours / of:5.2f}" for ours, of in zip(rates, raw_rate, strict=True))
        lines.append(
            f"{T:5} {name:27} {times} {rates[0]:5.0f} {rates[1]:5.0f}  {shares}  {beside[0]:6.1f} {beside[1]:6.1f}"
        )
    for T, peer in peers.items():
        times = f"raw push {peer['raw push']:.1f}, raw pull {peer['raw pull']:.1f}, NCCL {peer['nccl']:.1f}"
        times += f", lookup among replicas {peer['lookup']:.1f} us"
        lines.append(f"T {T}: {times}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="T of 32 and 4096 alone")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    need_gpus(arguments.ranks)
    shape, tokens = Shape(hidden=arguments.hidden), (32, 4096) if arguments.quick else TOKENS
    found = run_ranks(arguments.ranks, measure, astuple(shape), tokens, device="cuda", timeout_s=500)[0]
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}, NCCL {torch.cuda.nccl.version()}"
    print(
        f"{arguments.ranks} x {torch.cuda.get_device_name(0)}, {versions}; hidden {shape.hidden}, top-{shape.top_k}, us"
    )
    print("\n".join(table(found, shape)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "shape": vars(shape), "rows": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
