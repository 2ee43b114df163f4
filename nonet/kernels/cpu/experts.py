"""The activation between an expert's products; and whole experts of a few rows, as fast as their weights can be read.

Specified by `moe.experts.reference`. Legend: see moe/base.py; I expert intermediate.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.dot import HAS_BF16_DOT, MOST_ROWS, dots
from nonet.kernels.cpu.scalar import exp, f32, for_types, jit, put


def most_pairs(num_slots: int, dtype: torch.dtype) -> int:
    """Pairs up to which `run_experts` is faster than a batch over all slots (measured)."""
    return (3 if dtype == torch.bfloat16 and HAS_BF16_DOT else 1) * num_slots


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

    With a pool, its one thread takes the latter half of the slots that have pairs. `counts` is count_S as a list.
    """
    out = torch.empty((sum(counts), x_ND.shape[1]), dtype=x_ND.dtype)
    x, row, start, count, to = view(x_ND), view(row_M), view(start_S), view(count_S), view(out)
    gate_up, down = (view(weight) for weight in weights)
    used = [slot for slot, number in enumerate(counts) if number]
    half = used[len(used) // 2] if pool is not None and len(used) >= MOST_ROWS else None
    if half is None or pool is None:
        _run(x, row, start, count, gate_up, down, to)
        return out
    other = pool.submit(_run, x, row, start[half:], count[half:], gate_up[half:], down[half:], to)
    _run(x, row, start[:half], count[:half], gate_up[:half], down[:half], to)
    other.result()
    return out


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


@jit(*for_types("void(T[:,::1], int64[::1], int64[::1], int64[::1], T[:,:,::1], T[:,:,::1], T[:,::1])"))
def _run(x, row, start, count, gate_up, down, out):
    D, width = x.shape[1], down.shape[2]
    own, act = np.zeros((MOST_ROWS, D), x.dtype), np.zeros((MOST_ROWS, width), x.dtype)
    both, back = np.empty((MOST_ROWS, 2 * width), np.float32), np.empty((MOST_ROWS, D), np.float32)
    for s in range(len(count)):
        end = start[s] + count[s]
        for first in range(start[s], end, MOST_ROWS):
            rows = min(MOST_ROWS, end - first)
            for r in range(rows):
                own[r] = x[row[first + r]]
            for i in range(2 * width):
                dots(gate_up[s, i], own, rows, both, i)
            for r in range(rows):
                for i in range(width):
                    g = both[r, i]
                    put(act[r], i, g / (np.float32(1) + exp(-g)) * both[r, width + i])
            for d in range(D):
                dots(down[s, d], act, rows, back, d)
            for r in range(rows):
                for d in range(D):
                    put(out[first + r], d, back[r, d])
