"""Measures tiles of the Triton expert kernels on this GPU and writes what serving looks up: nonet/kernels/triton/tuned.

For each shape and number of tokens the whole layer (grouping, products, weighted sum) is timed in a CUDA graph, with
each candidate for the first product and then for the second. Kernels are compiled before, in many processes.
Run: python tools/tune_experts.py [--shapes qwen3-bf16 ...] [--processes N] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from nonet.kernels.fp8 import FP8
from nonet.kernels.triton import tuned
from nonet.kernels.triton.tiling import Tile
from nonet.kernels.triton.tuned import Bucket, Layer
from nonet.moe.base import group_by_slot
from nonet.moe.experts.triton import TritonExperts, tiles
from nonet.testing.expert_layers import SHAPES, Given, Shape, routed
from nonet.weights.slots import BlockScales, SlotWeights

DEVICE, BLOCK, ROUTINGS, REPLAYS = "cuda", 128, 4, 11
Pair = tuple[Tile, Tile]


def pairs_a_slot(shape: Shape) -> dict[int, float]:
    """By tokens, as callers count: all pairs of the rows that need any of these slots, here and elsewhere."""
    come = 1 - (1 - shape.slots / shape.experts) ** shape.top_k
    return {T: T * come * shape.top_k / shape.slots for T in shape.tokens}


def candidates(shape: Shape, tokens: int) -> tuple[list[Tile], list[Tile]]:
    """Of gate_up and of down."""
    gate_up, down, dtype = [], [], shape.dtype
    here = tokens * shape.top_k / shape.experts  # those that are here
    if here < 100:
        for BM in [16] if here < 6 else [16, 32] if here < 24 else [32, 64]:
            first, second = FEW_FP8 if dtype == FP8 else FEW
            gate_up += [Tile(BM, *rest, True) for rest in first]
            down += [Tile(BM, *rest, True) for rest in second]
    if here > 24:
        first, second = MANY_FP8 if dtype == FP8 else MANY
        gate_up += [Tile(*rest, False, each, halve) for *rest, each, halve in first]
        down += [Tile(*rest, False, each, halve) for *rest, each, halve in second]
    return gate_up, down


# BN, BK, warps, stages
FEW = (
    [(64, 256, 4, 3), (64, 128, 4, 5), (32, 256, 4, 4), (128, 128, 8, 3)],
    [(128, 64, 4, 4), (128, 128, 4, 4), (64, 128, 4, 4), (32, 256, 4, 3)],
)
FEW_FP8 = (
    [(128, 128, 4, 3), (128, 128, 4, 6), (128, 128, 8, 6), (128, 256, 8, 3)],
    [(128, 128, 4, 3), (64, 128, 4, 4), (128, 256, 4, 3), (64, 256, 4, 3)],
)
# BM, BN, BK, warps, stages, programs a multiprocessor, whether blocks are halved
MANY = (
    [(128, 128, 64, 8, 4, 0, True), (128, 128, 64, 8, 3, 0, True), (64, 128, 64, 4, 3, 0, False)],
    [(128, 256, 64, 8, 4, 0, True), (128, 256, 64, 8, 4, 1, True), (64, 128, 64, 4, 3, 0, False)],
)
MANY_FP8 = (
    [
        (128, 128, 128, 8, 3, 1, False),
        (128, 128, 128, 8, 3, 1, True),
        (128, 128, 128, 8, 4, 1, False),
        (128, 128, 128, 8, 4, 1, True),
        (128, 128, 128, 16, 3, 1, False),
        (64, 128, 128, 8, 3, 1, False),
    ],
    [
        (128, 256, 128, 8, 3, 1, False),
        (128, 256, 128, 8, 3, 1, True),
        (128, 256, 128, 8, 4, 1, False),
        (128, 256, 128, 8, 4, 1, True),
        (128, 256, 128, 16, 3, 1, False),
        (64, 128, 128, 4, 3, 0, False),
    ],
)


def weights_of(shape: Shape, filled: bool) -> SlotWeights:
    """Random, in allocations of their own; or, where nothing is computed, one for all slots."""

    def draw(*size: int) -> Tensor:
        numbers = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        return (numbers * (64 if shape.dtype == FP8 else size[-1] ** -0.5)).to(shape.dtype)

    own = [
        (draw(2 * shape.width, shape.hidden), draw(shape.hidden, shape.width))
        for _ in range(shape.slots if filled else 1)
    ]
    gate_up, down = zip(*own if filled else own * shape.slots, strict=True)
    if shape.dtype != FP8:
        return SlotWeights(gate_up, down)
    i, d = shape.width // BLOCK, shape.hidden // BLOCK
    scales = [torch.full(size, 1e-3, device=DEVICE) for size in ((2, i, d), (d, i))]
    return SlotWeights(gate_up, down, scales=BlockScales((scales[0],) * shape.slots, (scales[1],) * shape.slots, BLOCK))


def kernel_of(shape: Shape, pair: Pair) -> TritonExperts:
    """With these tiles for any number of pairs."""
    name = str(shape.dtype).removeprefix("torch.")
    return TritonExperts((Layer(shape.slots, shape.hidden, shape.width, name, (Bucket(1.0, *pair),)),))


def compile_pair(shape: Shape, pair: Pair) -> str | None:
    """In a process of its own: on rows without pairs, so that nothing is computed. Why it cannot be, if it cannot."""
    try:
        weights = weights_of(shape, filled=False)
        slot_NK = torch.full((1, shape.top_k), -1, device=DEVICE)
        x_ND, weight_NK = torch.zeros((1, shape.hidden), device=DEVICE, dtype=torch.bfloat16), torch.ones_like(slot_NK)
        kernel_of(shape, pair)(group_by_slot(x_ND, slot_NK, weight_NK.float(), shape.slots, None), weights, "rows")
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 (a tile too large for the chip fails in many ways)
        return str(error).splitlines()[0]
    return None


def microseconds(shape: Shape, weights: SlotWeights, inputs: list[Given], pair: Pair) -> float:
    """Of a layer in a graph over all inputs: median of replays."""
    kernel = kernel_of(shape, pair)

    def layers() -> None:
        for given in inputs:
            kernel(group_by_slot(*given, shape.slots, None), weights, "rows")

    layers()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        layers()
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def tune(name: str, shape: Shape, usable: set[tuple[str, int, Tile]]) -> Layer:
    weights, buckets = weights_of(shape, filled=True), []
    for tokens, pairs in pairs_a_slot(shape).items():
        torch.manual_seed(tokens)
        inputs = [routed(shape, tokens, DEVICE) for _ in range(ROUTINGS if tokens < 4096 else 1)]
        best = tiles(pairs, shape.dtype)
        rule = time = microseconds(shape, weights, inputs, best)
        for which, options in enumerate(candidates(shape, tokens)):
            tried = []
            for tile in options:
                if (name, which, tile) in usable:
                    pair = (tile, best[1]) if which == 0 else (best[0], tile)
                    tried.append((microseconds(shape, weights, inputs, pair), pair))
            tried.sort(key=lambda one: one[0])
            if tried and tried[0][0] < time:
                time, best = tried[0]
            print(f"  {('gate_up', 'down')[which]}", *(f"{t:,.1f} {_short(p[which])}" for t, p in tried[:5]), sep=" | ")
        print(f"{name} {tokens} tokens, {pairs:g} pairs a slot: {time:,.1f} us (rule {rule:,.1f})", flush=True)
        buckets.append(Bucket(pairs, *best))
    dtype = str(shape.dtype).removeprefix("torch.")
    return Layer(shape.slots, shape.hidden, shape.width, dtype, tuple(buckets))


def _short(tile: Tile) -> str:
    each, halved = f" e{tile.each}" if tile.each else "", " h" if tile.halve else ""
    return f"{tile.BM}x{tile.BN}x{tile.BK} w{tile.warps} s{tile.stages}{each}{halved}"


def write(device: str, layers: Iterable[Layer], folder: Path) -> Path:
    """These buckets instead of those of the same shapes for as many pairs; all others stay."""
    key = lambda own: (own.dtype, own.hidden, own.intermediate, own.slots)
    merged: dict[tuple[str, int, int, int], Layer] = {}
    for own in (*tuned.load(device, folder), *layers):
        known = merged[key(own)].buckets if key(own) in merged else ()
        buckets = {f"{bucket.pairs_a_slot:g}": bucket for bucket in (*known, *own.buckets)}
        in_order = sorted(buckets.values(), key=lambda bucket: bucket.pairs_a_slot)
        merged[key(own)] = replace(own, buckets=tuple(in_order))
    entries = []
    for _, own in sorted(merged.items()):
        rows = ",\n".join(
            f'    {{"pairs_a_slot": {b.pairs_a_slot:g}, "gate_up": {json.dumps(astuple(b.gate_up))}, '
            f'"down": {json.dumps(astuple(b.down))}}}'
            for b in own.buckets
        )
        head = {"slots": own.slots, "hidden": own.hidden, "intermediate": own.intermediate, "dtype": own.dtype}
        entries.append(f'  {json.dumps(head)[:-1]}, "buckets": [\n{rows}\n  ]}}')
    tile = "[BM, BN, BK, warps, stages, swap, each, halve]"
    text = f'{{"device": {json.dumps(device)}, "tile": "{tile}", "layers": [\n' + ",\n".join(entries) + "\n]}\n"
    file = tuned.path(device, folder)
    file.write_text(text)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of each shape's own")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--folder", type=Path, default=tuned.FOLDER, help="where to write the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_experts.py: needs a GPU, found none")
    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.tokens:
        shapes = {name: replace(shape, tokens=tuple(args.tokens)) for name, shape in shapes.items()}
    jobs: list[tuple[str, Pair]] = []
    for name, shape in shapes.items():
        first: dict[Tile, None] = {}
        second: dict[Tile, None] = {}
        for tokens in shape.tokens:
            for both, options in zip((first, second), candidates(shape, tokens), strict=True):
                both |= dict.fromkeys(options)
        jobs += [(name, (a or next(iter(first)), b or next(iter(second)))) for a, b in zip_longest(first, second)]
    usable = set()
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        said = pool.map(compile_pair, [shapes[name] for name, _ in jobs], [pair for _, pair in jobs])
        for (name, pair), reason in zip(jobs, said, strict=True):
            if reason:
                print(f"{name} cannot have {pair}: {reason}", flush=True)
            else:
                usable |= {(name, which, tile) for which, tile in enumerate(pair)}
    device = torch.cuda.get_device_name()
    layers = []
    for name, shape in shapes.items():
        layers.append(tune(name, shape, usable))
        print(write(device, layers, args.folder), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
