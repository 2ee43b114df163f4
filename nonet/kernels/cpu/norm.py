"""Root-mean-square normalisation, with the residual added before if there is one. Specified by `layers.norm`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import f32, for_types, jit, put


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] and weight [D], both contiguous."""
    out = torch.empty_like(x)
    D = x.shape[-1]
    _norm(view(x).reshape(-1, D), view(weight), view(out).reshape(-1, D), np.float32(eps))
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, its norm) for x and y [N, D]."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm(view(x), view(y), view(weight), view(total), view(out), np.float32(eps))
    return total, out


@jit(*for_types("void(T[:,::1], T[::1], T[:,::1], float32)"))
def _norm(x, weight, out, eps):
    N, D = x.shape
    for n in range(N):
        row, to = x[n], out[n]
        square = np.float32(0)
        for d in range(D):
            square += f32(row[d]) * f32(row[d])
        scale = np.float32(1) / np.sqrt(square / np.float32(D) + eps)
        for d in range(D):
            put(to, d, f32(row[d]) * scale * f32(weight[d]))


@jit(*for_types("void(T[:,::1], T[:,::1], T[::1], T[:,::1], T[:,::1], float32)"))
def _add_norm(x, y, weight, total, out, eps):
    N, D = x.shape
    for n in range(N):
        a, b, both, to = x[n], y[n], total[n], out[n]
        for d in range(D):
            put(both, d, f32(a[d]) + f32(b[d]))
        square = np.float32(0)
        for d in range(D):
            square += f32(both[d]) * f32(both[d])
        scale = np.float32(1) / np.sqrt(square / np.float32(D) + eps)
        for d in range(D):
            put(to, d, f32(both[d]) * scale * f32(weight[d]))
