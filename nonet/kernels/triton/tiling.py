"""What the grouped products over slots share: how they are cut up, and how a program finds its slot and reads tiles.

Used by `experts` and `experts_fp8`. Jobs are (block of a slot's pairs, tile of outputs); each program finds its slot by
counting blocks, so nothing is mapped before and nothing read on the host.
Legend: M pairs (an upper bound), S slots; BM pairs, BN outputs and BK inputs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nonet.kernels.triton import INTERPRETED

_TOGETHER = tl.constexpr(8)  # blocks of a slot that take turns


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut up. `swap`: the weight on the left. `each`: programs a multiprocessor, which take jobs in
    turns; 0: one program a job. `halve`, not with swap: a last block that is half empty is not computed whole."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    swap: bool
    each: int = 0
    halve: bool = False


def programs(M: int, S: int, tiles: int, tile: Tile, device: torch.device) -> int:
    """The size of the grid. There are at most min(M, M // BM + S) blocks: a slot's last one may be partly empty, but
    has a pair."""
    jobs = max(1, min(M, M // tile.BM + S)) * tiles
    if not tile.each:
        return jobs
    return min(jobs, tile.each * (1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count))


@triton.jit
def count_blocks(start, count, S, BM: tl.constexpr, SLOTS: tl.constexpr):
    """(pairs of each slot, where they start, where their blocks end; blocks of all slots)."""
    s = tl.arange(0, SLOTS)
    number = tl.load(count + s, mask=s < S, other=0).to(tl.int32)
    begin = tl.load(start + s, mask=s < S, other=0).to(tl.int32)
    blocks = (number + BM - 1) // BM
    return number, begin, tl.cumsum(blocks, axis=0), tl.sum(blocks, axis=0)


@triton.jit
def find(job, tiles: tl.constexpr, blocks_S, BM: tl.constexpr, SLOTS: tl.constexpr):
    """(slot, its first pair in this block, its pairs from there on, tile of outputs), by what `count_blocks` gave.

    Some blocks of a slot take turns: programs that run side by side then read the same parts of its weight.
    """
    number, begin, end, _ = blocks_S
    slot = tl.sum((end <= job // tiles).to(tl.int32), axis=0)
    own = tl.arange(0, SLOTS) == slot
    pairs = tl.sum(tl.where(own, number, 0), axis=0)
    blocks = (pairs + BM - 1) // BM
    job -= (tl.sum(tl.where(own, end, 0), axis=0) - blocks) * tiles
    first = job // (_TOGETHER * tiles) * _TOGETHER
    job -= first * tiles
    turns = tl.minimum(blocks - first, _TOGETHER)
    before = (first + job % turns) * BM
    return slot, tl.sum(tl.where(own, begin, 0), axis=0) + before, pairs - before, job // turns


@triton.jit
def at(address, slot, dtype: tl.constexpr):
    """The pointer to a slot's weight. Without the hints loads are of single numbers."""
    where = tl.multiple_of(tl.load(address + slot), 16)
    return tl.multiple_of(where.to(tl.pointer_type(dtype)), 16)


@triton.jit
def part(pointer, rows, columns, width: tl.constexpr, height: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a weight [height, width]."""
    to = pointer + rows[:, None].to(tl.int64) * width + columns[None, :]
    return tl.load(to) if WHOLE else tl.load(to, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0.0)


@triton.jit
def gathered(x, rows, columns, here, width: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of gathered rows, zeros where there is none."""
    mask = here[:, None] if WHOLE else here[:, None] & (columns[None, :] < width)
    return tl.load(x + rows[:, None].to(tl.int64) * width + columns[None, :], mask=mask, other=0.0)
