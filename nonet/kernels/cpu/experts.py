"""The activation between an expert's products; and whole experts of a few rows, as fast as their weights can be read.

Specified by `moe.experts.reference`. Legend: see moe/base.py; I expert intermediate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import exp, f32, for_types, jit, put


def run_experts(
    x_ND: Tensor, row_M: Tensor, start_S: Tensor, count_S: Tensor, gate_up_SID: Tensor, down_SDI: Tensor, total: int
) -> Tensor:
    """[total, D]: down(silu(gate(x)) * up(x)) of each pair, grouped by slot. gate_up is [S, 2I, D], down [S, D, I]."""
    out = torch.empty((total, x_ND.shape[1]), dtype=x_ND.dtype)
    _run(view(x_ND), view(row_M), view(start_S), view(count_S), view(gate_up_SID), view(down_SDI), view(out))
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
    D = x.shape[1]
    width = down.shape[2]
    a, b = np.empty(D, np.float32), np.empty(D, np.float32)  # two pairs share each read of the weights
    act_a, act_b = np.empty(2 * width, np.float32), np.empty(2 * width, np.float32)
    for s in range(len(count)):
        for m in range(start[s], start[s] + count[s], 2):
            both = m + 1 < start[s] + count[s]
            for d in range(D):
                a[d] = f32(x[row[m], d])
            if both:
                for d in range(D):
                    b[d] = f32(x[row[m + 1], d])
            for i in range(2 * width):
                w = gate_up[s, i]
                if both:
                    sum_a, sum_b = np.float32(0), np.float32(0)
                    for d in range(D):
                        sum_a += f32(w[d]) * a[d]
                        sum_b += f32(w[d]) * b[d]
                    act_a[i], act_b[i] = sum_a, sum_b
                else:
                    sum_a = np.float32(0)
                    for d in range(D):
                        sum_a += f32(w[d]) * a[d]
                    act_a[i] = sum_a
            for i in range(width):
                act_a[i] = act_a[i] / (np.float32(1) + exp(-act_a[i])) * act_a[width + i]
                if both:
                    act_b[i] = act_b[i] / (np.float32(1) + exp(-act_b[i])) * act_b[width + i]
            for d in range(D):
                w = down[s, d]
                if both:
                    sum_a, sum_b = np.float32(0), np.float32(0)
                    for i in range(width):
                        sum_a += f32(w[i]) * act_a[i]
                        sum_b += f32(w[i]) * act_b[i]
                    put(out[m], d, sum_a)
                    put(out[m + 1], d, sum_b)
                else:
                    sum_a = np.float32(0)
                    for i in range(width):
                        sum_a += f32(w[i]) * act_a[i]
                    put(out[m], d, sum_a)
