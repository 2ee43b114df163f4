"""Whole experts, as fast as their weights can be read or the processor's tiles multiply; and their activation alone.

Specified by `moe.experts.reference`. Legend: see moe/base.py; I expert intermediate.
"""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nonet.kernels.cpu import tiles, view
from nonet.kernels.cpu.dot import HAS_BF16_DOT, MOST_ROWS, products
from nonet.kernels.cpu.scalar import bfloat16_bits, exp, f32, for_types, jit, put
from nonet.kernels.cpu.tiles import DEPTH, SIDE, configure, describe, multiply_1, multiply_2, pack, remember, unpack


def handles(pairs: int, weights: tuple[Tensor, Tensor]) -> bool:
    """Whether `run_experts` is the fastest way for so many pairs (measured): with tiles always, else for few."""
    if _fit_tiles(weights):
        return True
    with_instruction = HAS_BF16_DOT and weights[0].dtype == torch.bfloat16
    return pairs <= (3 if with_instruction else 1) * len(weights[0])


def _fit_tiles(weights: tuple[Tensor, Tensor]) -> bool:
    whole = all(weight.shape[2] and weight.shape[2] % DEPTH == 0 for weight in weights)
    return whole and tiles.HAS_TILES and weights[0].dtype == torch.bfloat16


def run_experts(
    x_ND: Tensor,
    row_M: Tensor,
    start_S: Tensor,
    count_S: Tensor,
    weights: tuple[Tensor, Tensor],
    counts: list[int],
    pool: ThreadPoolExecutor | None = None,
) -> Tensor:
    """[M, D]: down(silu(gate(x)) * up(x)) of each pair, grouped by slot. weights are [S, 2I, D] and [S, D, I].

    With a pool, its one thread takes the latter half of the work. `counts` is count_S as a list.
    """
    out = torch.empty((sum(counts), x_ND.shape[1]), dtype=x_ND.dtype)
    x, row, start, count, to = view(x_ND), view(row_M), view(start_S), view(count_S), view(out)
    gate_up, down = (view(weight) for weight in weights)
    run = _run_tiles if _fit_tiles(weights) else _run
    half = _half(counts)
    if not half or pool is None:
        run(x, row, start, count, gate_up, down, to)
        return out
    other = pool.submit(run, x, row, start[half:], count[half:], gate_up[half:], down[half:], to)
    run(x, row, start[:half], count[:half], gate_up[:half], down[:half], to)
    other.result()
    return out


def _half(counts: list[int]) -> int:
    """The slots before it make about half of the work, few rows costing as one panel; 0: too little to share."""
    work = list(accumulate(max(count, SIDE) if count else 0 for count in counts))
    if not work or work[-1] < MOST_ROWS * SIDE:
        return 0
    return min(bisect_left(work, work[-1] / 2) + 1, len(work) - 1)


def silu_and_multiply(both: Tensor) -> Tensor:
    """silu(gate) * up, of gate beside up: [M, I] of [M, 2I], [S, I, C] of [S, 2I, C]."""
    out = torch.empty((both.shape[0], both.shape[1] // 2, *both.shape[2:]), dtype=both.dtype)
    _activate(view(both).reshape(both.shape[0], 2, -1), view(out).reshape(both.shape[0], -1))
    return out


@jit(*for_types("void(T[:,:,::1], T[:,::1])"))
def _activate(both, out):
    N, _, width = both.shape
    for n in range(N):
        gate, up, to = both[n, 0], both[n, 1], out[n]
        for i in range(width):
            g = f32(gate[i])
            put(to, i, g / (np.float32(1) + exp(-g)) * f32(up[i]))


@njit(inline="always")
def _few_rows(x, row, first, rows, gate_up, down, out, own, both, act, back):
    """One expert for `rows` pairs from number `first`, at most MOST_ROWS; the last four are memory to work in."""
    width = down.shape[1]
    for r in range(rows):
        own[r] = x[row[first + r]]
    products(gate_up, own, rows, both)
    for r in range(rows):
        gate, up, to = both[r, :width], both[r, width:], act[r]
        for i in range(width):
            put(to, i, gate[i] / (np.float32(1) + exp(-gate[i])) * up[i])
    products(down, act, rows, back)
    for r in range(rows):
        to, result = out[first + r], back[r]
        for d in range(len(result)):
            put(to, d, result[d])


@njit(inline="always")
def _memory(D, width, dtype):
    own, act = np.zeros((MOST_ROWS, D), dtype), np.zeros((MOST_ROWS, width), dtype)
    return own, np.empty((MOST_ROWS, 2 * width), np.float32), act, np.empty((MOST_ROWS, D), np.float32)


@jit(*for_types("void(T[:,::1], int64[::1], int64[::1], int64[::1], T[:,:,::1], T[:,:,::1], T[:,::1])"))
def _run(x, row, start, count, gate_up, down, out):
    own, both, act, back = _memory(x.shape[1], down.shape[2], x.dtype)
    for s in range(len(count)):
        end = start[s] + count[s]
        for first in range(start[s], end, MOST_ROWS):
            _few_rows(x, row, first, min(MOST_ROWS, end - first), gate_up[s], down[s], out, own, both, act, back)


if tiles.HAS_TILES:
    _PANEL_BYTES = 1 << 19  # of activations packed at a time, so that they stay in a core's own cache

    @njit(inline="always")
    def _gate_up_tiles(weight, packed, panels, act, sums):
        """act[p] = silu(gate) * up of panel p, packed: two neighbours of the intermediate width in each number."""
        D, width = weight.shape[1], len(weight) // 2
        for i in range(0, width, SIDE):
            for p in range(0, panels, 2):
                ahead = 0 if p else SIDE * D
                if p + 1 < panels:
                    multiply_2(weight, i, width + i, packed, p, ahead, sums)
                else:
                    multiply_1(weight, i, width + i, packed, p, ahead, sums)
                for q in range(min(2, panels - p)):
                    for n in range(0, SIDE, 2):
                        gate_0, gate_1, up_0, up_1 = sums[0, q, n], sums[0, q, n + 1], sums[1, q, n], sums[1, q, n + 1]
                        to = act[p + q, (i + n) // 2]
                        for m in range(SIDE):
                            a = gate_0[m] / (np.float32(1) + exp(-gate_0[m])) * up_0[m]
                            b = gate_1[m] / (np.float32(1) + exp(-gate_1[m])) * up_1[m]
                            to[m] = bfloat16_bits(a) | (bfloat16_bits(b) << np.uint32(16))

    @njit(inline="always")
    def _down_tiles(weight, act, rows, sums, out, spare):
        D = len(weight)
        panels, last = -(-rows // SIDE), rows // SIDE
        for d in range(0, D, 2 * SIDE):
            for p in range(0, panels, 2):
                ahead = 0 if p else 2 * SIDE * weight.shape[1]
                if p + 1 < panels:
                    multiply_2(weight, d, d + SIDE, act, p, ahead, sums)
                else:
                    multiply_1(weight, d, d + SIDE, act, p, ahead, sums)
                for q in range(min(2, panels - p)):
                    for i in range(2):
                        if p + q < last:
                            unpack(sums, i, q, out, (p + q) * SIDE, d + i * SIDE)
                        else:
                            unpack(sums, i, q, spare, 0, d + i * SIDE)
        for m in range(last * SIDE, rows):
            out[m] = spare[m - last * SIDE]

    @jit("void(uint16[:,::1], int64[::1], int64[::1], int64[::1], uint16[:,:,::1], uint16[:,:,::1], uint16[:,::1])")
    def _run_tiles(x, row, start, count, gate_up, down, out):
        """As `_run`, for more rows by tiles."""
        D, width = x.shape[1], down.shape[2]
        few, both, few_act, back = _memory(D, width, x.dtype)
        wanted, fitting = -(-count.max() // SIDE), max(2, _PANEL_BYTES // (2 * D * SIDE))
        panels = min(wanted, fitting)
        own, spare = np.empty(panels * SIDE, np.int64), np.empty((SIDE, D), np.uint16)
        packed = np.empty((panels, D // 2, SIDE), np.uint32)
        act = np.empty((panels, width // 2, SIDE), np.uint32)
        sums = np.empty((2, 2, SIDE, SIDE), np.float32)
        config, before = np.empty(64, np.uint8), np.empty(64, np.uint8)
        describe(config)
        remember(before)
        configure(config)
        for s in range(len(count)):
            end = start[s] + count[s]
            if count[s] <= MOST_ROWS:
                if count[s]:
                    _few_rows(x, row, start[s], count[s], gate_up[s], down[s], out, few, both, few_act, back)
                continue
            for first in range(start[s], end, panels * SIDE):
                rows = min(panels * SIDE, end - first)
                used = -(-rows // SIDE)
                for m in range(used * SIDE):  # what fills the last panel is computed and dropped
                    own[m] = row[first + min(m, rows - 1)]
                for p in range(used):
                    pack(x, own, p * SIDE, packed, p)
                _gate_up_tiles(gate_up[s], packed, used, act, sums)
                _down_tiles(down[s], act, rows, sums, out[first:], spare)
        configure(before)
