"""Decode attention over the paged cache: each sequence's one token; grouped queries, windows, chunks and sinks.

Specified by `layers.attention.decode`; `latent_decode` uses the same kernels for rows that are keys and values at once.
The tiles of all contexts and KV heads, laid end to end, are cut into equal spans, one a program, whatever the lengths
are: nothing is planned on the host. A span's ends cut through contexts; a second launch joins what several programs
found of one, as in Flash-Decoding (Dao et al., 2023) with the cuts of Stream-K (Osama et al., arXiv:2301.03598).
An empty context has a tile too, with nothing in it.
Legend: B sequences, H query heads, h KV heads, G = H / h query heads that share one, d head_dim, N blocks of the
longest context; BN places of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton import INTERPRETED
from nonet.kernels.triton.early import early, wait_for_the_kernel_before

ALL = 1 << 30  # no context is longer
LOWEST = tl.constexpr(-1e30)  # no product is lower; not -inf, since its difference from itself is no number
MOST_EARLY = 16  # programs a multiprocessor: the waits of twice as many cost more than an early start gains
LOG2_E = tl.constexpr(math.log2(math.e))  # the kernels' exponentials are of base 2


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut. heads: query heads a program takes at most. per_core: programs for each multiprocessor."""

    BN: int
    heads: int
    warps: int
    stages: int
    per_core: int


def decode(
    q_BHd: Tensor,
    cache: tuple[Tensor, ...],
    block_BN: Tensor,
    length_B: Tensor,
    block_size: int,
    out_BHd: Tensor,
    window: int | None = None,
    chunk: int | None = None,
    sink_H: Tensor | None = None,
    scale: float | None = None,
    tile: Tile | None = None,
) -> None:
    """Into out: each sequence's one token attends to its context, the first length_B places of its blocks.

    cache: keys and values [places, h, d] in q's dtype; block_BN, length_B: int64; a sequence of length 0 gets zeros.
    window, chunk, sink_H (float32) and scale are those of `layers.attention.Sight`.
    """
    keys, values = cache
    d = keys.shape[2]
    tile = tile or choose(d, q_BHd.element_size())
    run(q_BHd, keys, values, block_BN, length_B, block_size, out_BHd, d, 0, window, chunk, sink_H, scale, tile)


def choose(d: int, bytes_a_number: int) -> Tile:
    """Fastest on an H100; a tile of keys or values is 16 KB at most, lest stages do not fit."""
    BN = max(16, min(64, (16384 // (bytes_a_number * triton.next_power_of_2(d)))))
    return Tile(BN, 64, 4, 3, 2)


def run(
    q_BHx: Tensor, keys: Tensor, values: Tensor | None, block_BN: Tensor, length_B: Tensor, block_size: int,
    out_BHd: Tensor, d: int, rest: int, window: int | None, chunk: int | None, sink_H: Tensor | None,
    scale: float | None, tile: Tile, programs: int | None = None,
) -> None:  # fmt: skip
    """Both launches. Keys have d numbers and `rest` more; without values, a key's first d are those."""
    B, H, _ = q_BHx.shape
    if not B:
        return
    assert keys[0].is_contiguous(), "the heads of a place lie side by side"
    h, shared = keys.shape[1], values is None
    G = H // h
    heads = min(tile.heads, max(16, triton.next_power_of_2(G)))
    packs = triton.cdiv(G, heads)
    programs = programs or max(1, cores(q_BHx.device) * tile.per_core // packs)
    left = scratch(programs, packs * heads, d, q_BHx.device)
    values = keys if values is None else values
    scale = 1 / math.sqrt(d + rest) if scale is None else scale
    _spans[(programs * packs,)](
        q_BHx, keys, values, block_BN, length_B, out_BHd, *left, sink_H, B, block_BN.stride(0), *q_BHx.stride()[:2],
        keys.stride(0), values.stride(0), *out_BHd.stride()[:2], scale * LOG2_E.value, window or ALL, chunk or ALL,
        programs, h=h, G=G, DIM=d, REST=rest, SHARED=shared, SIZE=block_size, SLOTS=slots(B),
        HAS_SINK=sink_H is not None, HEADS=heads, PACKS=packs, BN=tile.BN, WIDE=INTERPRETED, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    join(out_BHd, *left, h, sink_H)


def scratch(programs: int, rows: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What programs leave of contexts that others share; rows: query heads of a KV head, up to a whole tile.

    Sums of two such contexts, [programs, 2, rows, d]; their highest products and sums of weights, [2, programs, 2,
    rows]; of the one that is cut at the program's end, [programs, 3]: which it is (-1: none), the last program that has
    a part of it, and which of the two this program's is. Of the other, all have theirs in the first place.
    """
    part = torch.empty((programs, 2, rows, d), dtype=torch.float32, device=device)
    top = torch.empty((2, programs, 2, rows), dtype=torch.float32, device=device)
    return part, top, torch.empty((programs, 3), dtype=torch.int32, device=device)


def join(out_BHd: Tensor, part: Tensor, top: Tensor, cut: Tensor, h: int, sink_H: Tensor | None = None) -> None:
    """The second launch: into out, of each context that several programs have a part of."""
    B, H, d = out_BHd.shape
    programs, _, rows, _ = part.shape
    parts = min(16, triton.next_power_of_2(programs // (B * h) + 2))  # of a context, where all are as long
    heads = min(16 // parts, triton.next_power_of_2(H // h))
    grid = programs * triton.cdiv(H // h, heads)
    how = early(out_BHd.device) if grid <= MOST_EARLY * cores(out_BHd.device) else {"EARLY": False}
    _join[(grid,)](
        out_BHd, part, top, cut, sink_H, *out_BHd.stride()[:2], programs, h=h, G=H // h, DIM=d,
        HAS_SINK=sink_H is not None, PARTS=parts, HEADS=heads, ROWS=rows, num_warps=4, **how,
    )  # fmt: skip


def slots(B: int) -> int:
    """Sequences that programs count: few different numbers, since each is compiled for."""
    return 64 if B <= 64 else max(512, triton.next_power_of_2(B))


def cores(device: torch.device) -> int:
    """Multiprocessors; in the interpreter a few programs are enough."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _seen(number, window, chunk):
    """The first position that the last of so many sees."""
    last = number - 1
    return tl.maximum(tl.maximum(number - window, last - last % chunk), 0)


@triton.jit
def _tiles(length, B, window, chunk, BN: tl.constexpr, SLOTS: tl.constexpr):
    """[SLOTS]: tiles of each sequence's context."""
    b = tl.arange(0, SLOTS)
    number = tl.load(length + b, mask=b < B, other=0).to(tl.int32)
    first = _seen(number, window, chunk) // BN
    return tl.where(b < B, tl.maximum((number + BN - 1) // BN - first, 1), 0)


@triton.jit
def _span(total, programs):
    """Tiles of a program."""
    return tl.maximum((total + programs - 1) // programs, 1)


@triton.jit
def _place(blocks, position, number, SIZE: tl.constexpr):
    """Cache places of positions, 0 past the last."""
    block = tl.load(blocks + position // SIZE, mask=position < number, other=0)
    return block * SIZE + position % SIZE


@triton.jit
def _load(rows, column, here, DIM: tl.constexpr):
    """[BN, columns] of the rows that begin there, zeros where there is none: NaN may stand in the cache."""
    at = rows[:, None] + column[None, :]
    whole: tl.constexpr = column.shape[0] == DIM
    mask = here[:, None] if whole else here[:, None] & (column[None, :] < DIM)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _mean(sums, mass):
    return sums / tl.where(mass > 0, mass, 1.0)  # of an empty context, zeros


@triton.jit
def _attend(
    q_rows, ours, keys, values, key_stride, value_stride, blocks, number, seen, start, after, scale,
    DIM: tl.constexpr, REST: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
    BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Query heads over tiles start .. after - 1 of a context: (highest product, sum of weights, weighted values)."""
    D: tl.constexpr = 16 if DIM < 16 else triton.next_power_of_2(DIM)
    R: tl.constexpr = 16 if REST < 16 else triton.next_power_of_2(REST)
    column, rest, n = tl.arange(0, D), tl.arange(0, R), tl.arange(0, BN)
    query = tl.load(q_rows + column[None, :], mask=ours & (column[None, :] < DIM), other=0.0)
    if REST > 0:
        query_rest = tl.load(q_rows + DIM + rest[None, :], mask=ours & (rest[None, :] < REST), other=0.0)
    best, mass = tl.full([HEADS], LOWEST, tl.float32), tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, D], tl.float32)
    place = _place(blocks, start * BN + n, number, SIZE)
    for i in range(start, after):
        position = i * BN + n
        here = (position >= seen) & (position < number)
        row = keys + place * key_stride
        key = _load(row, column, here, DIM)
        score = _dot(query, key.T, tl.zeros([HEADS, BN], tl.float32), WIDE)
        if REST > 0:
            score = _dot(query_rest, _load(row + DIM, rest, here, REST).T, score, WIDE)
        value = key if SHARED else _load(values + place * value_stride, column, here, DIM)
        place = _place(blocks, position + BN, number, SIZE)  # of the next tile: known before its turn comes
        score = tl.where(here[None, :], score * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        mass = mass * fade + tl.sum(weight, axis=1)
        sums = _dot(weight.to(value.dtype), value, sums * fade[:, None], WIDE)
        best = higher
    return best, mass, sums


@triton.jit(do_not_specialize=["B", "block_stride", "window", "chunk", "programs"])
def _spans(
    q, keys, values, block, length, out, part, top, cut, sink,
    B, block_stride, q_stride, q_head, key_stride, value_stride, out_stride, out_head, scale, window, chunk, programs,
    h: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, SHARED: tl.constexpr,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, HAS_SINK: tl.constexpr, HEADS: tl.constexpr, PACKS: tl.constexpr,
    BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = PACKS * HEADS
    me, pack = tl.program_id(0) // PACKS, tl.program_id(0) % PACKS
    column, g = tl.arange(0, 16 if DIM < 16 else triton.next_power_of_2(DIM)), pack * HEADS + tl.arange(0, HEADS)
    ours, inside = (g < G)[:, None], (g < G)[:, None] & (column[None, :] < DIM)
    tiles_B = _tiles(length, B, window, chunk, BN, SLOTS) * h
    end_B = tl.cumsum(tiles_B, axis=0)
    total = tl.sum(tiles_B, axis=0)
    span = _span(total, programs)
    tile, stop, slot = me * span, tl.minimum((me + 1) * span, total), 0
    which, last, place = -1, 0, 0
    while tile < stop:  # a part of a context, or all of it, at a time
        b = tl.sum((end_B <= tile).to(tl.int32), axis=0)
        number = tl.load(length + b).to(tl.int32)
        seen = _seen(number, window, chunk)
        first = seen // BN
        tiles = tl.maximum((number + BN - 1) // BN - first, 1)
        own = tile - tl.sum(tl.where(tl.arange(0, SLOTS) < b, tiles_B, 0), axis=0)
        head, start = own // tiles, own % tiles
        count = tl.minimum(tiles - start, stop - tile)
        b = b.to(tl.int64)
        best, mass, sums = _attend(
            q + b * q_stride + (head * G + g)[:, None] * q_head, ours, keys + head * (DIM + REST), values + head * DIM,
            key_stride, value_stride, block + b * block_stride, number, seen, first + start, first + start + count,
            scale, DIM, REST, SHARED, SIZE, HEADS, BN, WIDE,
        )  # fmt: skip
        if count == tiles:
            if HAS_SINK:
                logit = tl.load(sink + head * G + g, mask=g < G, other=0.0) * LOG2_E
                mass += tl.exp2(tl.minimum(logit - best, 100.0))  # beyond, nothing is left of the rest
            to = out + b * out_stride + (head * G + g)[:, None] * out_head + column[None, :]
            tl.store(to, _mean(sums, mass[:, None]).to(out.dtype.element_ty), mask=inside)
        else:
            at = (me * 2 + slot) * ROWS + g
            tl.store(part + at[:, None].to(tl.int64) * DIM + column[None, :], sums, mask=inside)
            tl.store(top + at, best)
            tl.store(top + programs * 2 * ROWS + at, mass)
            if start == 0:
                which, last, place = (b * h + head).to(tl.int32), (tile + tiles - 1) // span, slot
        tile += count
        slot = 1
    tl.store(cut + me * 3, which)
    tl.store(cut + me * 3 + 1, last)
    tl.store(cut + me * 3 + 2, place)


@triton.jit(do_not_specialize=["programs"])
def _join(
    out, part, top, cut, sink, out_stride, out_head, programs,
    h: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, HAS_SINK: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some query heads of the context that is cut at a program's end, if this is its first cut."""
    D: tl.constexpr = triton.next_power_of_2(DIM)
    PACKS: tl.constexpr = (G + HEADS - 1) // HEADS
    wait_for_the_kernel_before(EARLY)
    me, g = tl.program_id(0) // PACKS, tl.program_id(0) % PACKS * HEADS + tl.arange(0, HEADS)
    which = tl.load(cut + me * 3)
    if which >= 0:
        last, place, column = tl.load(cut + me * 3 + 1), tl.load(cut + me * 3 + 2), tl.arange(0, D)
        query, ours = which % h * G + g, g < G
        best, mass = tl.full([HEADS], LOWEST, tl.float32), tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, D], tl.float32)
        if HAS_SINK:
            best, mass = tl.load(sink + query, mask=ours, other=0.0) * LOG2_E, mass + 1.0
        for p in range(me, last + 1, PARTS):
            program = p + tl.arange(0, PARTS)
            here = (program <= last)[:, None] & ours[None, :]
            at = ((program * 2 + tl.where(program == me, place, 0)) * ROWS)[:, None] + g[None, :]
            tops = tl.load(top + at, mask=here, other=LOWEST)
            masses = tl.load(top + programs * 2 * ROWS + at, mask=here, other=0.0)
            mask = here[:, :, None] & (column < DIM)[None, None, :]
            parts = tl.load(part + at[:, :, None].to(tl.int64) * DIM + column[None, None, :], mask=mask, other=0.0)
            higher = tl.maximum(best, tl.max(tops, axis=0))
            fade, fades = tl.exp2(best - higher), tl.exp2(tops - higher[None, :])
            mass = mass * fade + tl.sum(masses * fades, axis=0)
            sums = sums * fade[:, None] + tl.sum(parts * fades[:, :, None], axis=0)
            best = higher
        to = out + (which // h).to(tl.int64) * out_stride + query[:, None] * out_head + column[None, :]
        mean = _mean(sums, mass[:, None])
        tl.store(to, mean.to(out.dtype.element_ty), mask=ours[:, None] & (column < DIM)[None, :])
