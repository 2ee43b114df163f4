"""Small operations on a GPU: fused in Triton against plain PyTorch, in a graph and called one by one.

    python benchmarks/gpu_small.py [--rows 1 32 256 4096] [--drawn 1 32 256]

Each line is an operation at a number of rows: microseconds of the plain form and of the fused one, their ratio, and the
fused one's time over that of moving its bytes at the speed of a large copy, measured in the same run. Calls take turns
on several sets of tensors. A plain form that reads something on the host cannot be captured; it says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import triton
from _gpu import need_gpus
from torch import Tensor

from nonet.config.fleet import Fleet
from nonet.engine import sampler
from nonet.eplb.placement import Placement
from nonet.kernels.cpu.noise import exponential
from nonet.kernels.triton import activation, lookup, norm, rope, routing, sampling
from nonet.layers.attention import place_qkv
from nonet.layers.mlp import silu_times_reference
from nonet.layers.norm import rms_norm_reference
from nonet.layers.rope import Rope, rotate
from nonet.moe.load import count_reference
from nonet.moe.lookup import Even
from nonet.moe.router import Groups, scored_topk_reference, softmax_topk_reference
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams

GPU = torch.device("cuda")
SETS, REPLAYS = 4, 21
Call = Callable[[int], object]  # of a set's number


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    plain: Call
    fused: Call
    bytes: int


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape, device=GPU).to(dtype) for _ in range(SETS)]


def norms(T: int, D: int) -> Iterator[Case]:
    x, y, weight, size = draw(T, D), draw(T, D), torch.ones(D, device=GPU, dtype=torch.bfloat16), 2 * T * D

    def plain_sum(i: int) -> object:
        total = x[i] + y[i]
        return total, rms_norm_reference(total, weight, 1e-6)

    plain, fused = (lambda i: rms_norm_reference(x[i], weight, 1e-6)), (lambda i: norm.rms_norm(x[i], weight, 1e-6))
    yield Case(f"rms_norm D {D}", T, plain, fused, 2 * size)
    yield Case(f"add_rms_norm D {D}", T, plain_sum, lambda i: norm.add_rms_norm(x[i], y[i], weight, 1e-6), 4 * size)


def placing(T: int, H: int, h: int, d: int) -> Iterator[Case]:
    qkv, cache = draw(T, H + 2 * h, d), [tuple(draw(2 * T, h, d)[:2]) for _ in range(SETS)]
    weights = torch.ones((H + h, d), device=GPU, dtype=torch.bfloat16), 1e-6
    cos_sin = Rope(d, 1e6, 8192, torch.bfloat16, GPU).at(torch.arange(T, device=GPU))
    place_T = torch.randperm(2 * T, device=GPU)[:T]
    shared = weights, cos_sin
    yield Case(
        f"place_qkv H {H} h {h} d {d}",
        T,
        lambda i: place_qkv(qkv[i], *shared, cache[i], place_T, H),
        lambda i: rope.place_qkv(qkv[i], *shared, cache[i], place_T, H),
        4 * T * (H + 2 * h) * d + 4 * T * d,
    )


def placing_latent(T: int, H: int, n: int, c: int, r: int) -> Iterator[Case]:
    q, row, cache = draw(T, H, n + r), draw(T, c + r), draw(2 * T, 1, c + r)
    weights = torch.ones(c, device=GPU, dtype=torch.bfloat16), 1e-6
    cos_sin = Rope(r, 1e4, 8192, torch.bfloat16, GPU).at(torch.arange(T, device=GPU))
    place_T = torch.randperm(2 * T, device=GPU)[:T]

    def plain(i: int) -> object:
        turned = torch.cat([q[i][..., :-r], rotate(q[i][..., -r:], *cos_sin)], dim=-1)
        k_Tr = rotate(row[i][:, None, c:], *cos_sin).squeeze(1)
        own = torch.cat([rms_norm_reference(row[i][:, :c].contiguous(), *weights), k_Tr], dim=-1)
        return turned, cache[i].index_copy_(0, place_T, own.unsqueeze(1))

    yield Case(
        f"place_latent H {H} c {c} r {r}",
        T,
        plain,
        lambda i: rope.place_latent(q[i], row[i], weights, cos_sin, cache[i], place_T),
        4 * T * (H * r + c + r) + 4 * T * r,
    )


def gated(T: int, width: int) -> Iterator[Case]:
    x = draw(T, 2 * width)
    yield Case(
        f"silu_times I {width}",
        T,
        lambda i: silu_times_reference(x[i]),
        lambda i: activation.silu_times(x[i]),
        6 * T * width,
    )


def routed(T: int) -> Iterator[Case]:
    small, large, bias = draw(T, 128), draw(T, 256, dtype=torch.float32), draw(256, dtype=torch.float32)[0]
    how = dict(bias_E=bias, renormalise=True, scale=2.5)
    yield Case(
        "softmax top 8 of 128",
        T,
        lambda i: softmax_topk_reference(small[i], 8, True),
        lambda i: routing.topk(small[i], 8, renormalise=True),
        T * (2 * 128 + 12 * 8),
    )
    yield Case(
        "sigmoid top 8 of 256, 4 of 8 groups",
        T,
        lambda i: scored_topk_reference(large[i], 8, "sigmoid", groups=Groups(8, 4, 2), **how),
        lambda i: routing.topk(large[i], 8, sigmoid=True, groups=(8, 4, 2), **how),
        T * (4 * 256 + 12 * 8),
    )


def looked_up(T: int) -> Iterator[Case]:
    expert = [torch.rand((T, 128), device=GPU).topk(8).indices for _ in range(SETS)]
    counts = torch.zeros(128, dtype=torch.int64, device=GPU)
    for replicas in (0, 16):
        slots = np.array([[*range(128), *range(replicas)]], dtype=np.int32)
        table = Even(Placement(slots, Fleet.even(1, 128 + replicas), 128), 0, 1, GPU)
        name = f"lookup, {replicas} replicas more" if replicas else "lookup"
        args = table.slot_EC, table.count_E, 1
        fused = lambda i, args=args: lookup.look_up(expert[i], *args)
        yield Case(name, T, lambda i, table=table: table.reference(expert[i]), fused, 16 * 8 * T)
    yield Case(
        "count",
        T,
        lambda i: count_reference(expert[i], counts),
        lambda i: lookup.count(expert[i], counts),
        8 * 8 * T,
    )


def sampled(B: int, V: int) -> Iterator[Case]:
    logits = draw(B, V)
    plain = lambda i: logits[i].float().argmax(dim=-1)
    yield Case(f"argmax V {V}", B, plain, lambda i: sampling.argmax(logits[i]), 2 * B * V)


def cases(T: int) -> Iterator[Case]:
    yield from norms(T, 2048)
    yield from norms(T, 7168)
    yield from placing(T, 32, 4, 128)
    yield from placing_latent(T, 128, 128, 512, 64)
    yield from gated(T, 2048)
    yield from routed(T)
    yield from looked_up(T)
    if T <= 256:
        yield from sampled(T, 151936)


def drawing(B: int, V: int) -> None:
    """Prints milliseconds of sampling, by each row alone and all at once, and what of it is noise and the kernel."""
    logits, noise = draw(B, V)[0] * 3, torch.empty((B, V), pin_memory=True)
    threads = ThreadPoolExecutor()
    made = one_by_one(lambda i: list(threads.map(lambda row: exponential(7, row), noise)), 1, 3)
    for name, params in (("top_p", dict(top_p=0.95)), ("top_k, top_p", dict(top_k=50, top_p=0.95)), ("plain", {})):
        each = [Sequence(str(b), [1], SamplingParams(**params), max_tokens=9, seed=b) for b in range(B)]
        given = [part.to(GPU) for part in (torch.arange(B), sampler.settings(each), noise)]

        def plain(i: int, each: list[Sequence] = each) -> object:
            return [sampler.draw(logits[b].float(), one) for b, one in enumerate(each)]

        alone = one_by_one(plain, 1, 3)
        together = one_by_one(lambda i, each=each: sampler.draw_rows(logits, range(B), each, threads), 1, 3)
        kernel = in_graph(lambda i, given=given: sampling.draw(logits, *given), 2)
        assert kernel is not None, "every kernel can be captured"
        parts = f"noise {made / 1e3:6.1f}, kernel {kernel / 1e3:5.2f}"
        print(f"drawing {name:12} rows {B:4}: {alone / 1e3:7.1f} -> {together / 1e3:6.1f} ms ({parts})", flush=True)


def in_graph(call: Call, calls: int = 4 * SETS) -> float | None:
    """Microseconds a call, captured together and replayed; None where it cannot be captured."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i % SETS)
    except RuntimeError as error:
        torch.cuda.synchronize()
        if "captur" not in str(error):
            raise
        return None
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[REPLAYS // 2]


def one_by_one(call: Call, calls: int = 50, rounds: int = 5) -> float:
    """Microseconds a call from the host's clock, launches included."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(calls):
            call(i % SETS)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return sorted(times)[rounds // 2]


def copy_speed() -> float:
    """Bytes read and written a microsecond by a large copy."""
    x, y = (torch.zeros(1 << 28, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    taken = in_graph(lambda i: torch.neg(x, out=y), 4)
    assert taken is not None
    return 2 * x.nbytes / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 4096])
    parser.add_argument("--drawn", type=int, nargs="*", default=[1, 32, 256], help="rows that are drawn at once")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    chosen = parser.parse_args()
    need_gpus()
    speed = copy_speed()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; copy {speed / 1e6:.2f} TB/s; us, graph | one by one")
    print(
        f"{'operation':36} {'rows':>5} {'plain':>7} {'fused':>7} {'ratio':>6} {'/floor':>7} | {'plain':>7} {'fused':>7}"
    )
    for T in chosen.rows:
        for case in cases(T):
            if chosen.only not in case.name:
                continue
            plain, fused = in_graph(case.plain), in_graph(case.fused)
            assert fused is not None, "every kernel can be captured"
            ratio = f"{plain:7.1f} {fused:7.1f} {plain / fused:6.2f}" if plain else f"{'no':>7} {fused:7.1f} {'':6}"
            floor = fused / (case.bytes / speed)
            eager = f"{one_by_one(case.plain):7.1f} {one_by_one(case.fused):7.1f}"
            print(f"{case.name:36} {T:5} {ratio} {floor:7.1f} | {eager}", flush=True)
    for B in chosen.drawn if chosen.only in "drawing" else ():
        drawing(B, 151936)


if __name__ == "__main__":
    main()
