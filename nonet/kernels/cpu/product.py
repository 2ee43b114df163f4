"""x times a weight's transpose for a few rows, as fast as the weight can be read. Specified by `kernels.linear`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.dot import HAS_BF16_DOT, MOST_ROWS, products
from nonet.kernels.cpu.scalar import f32, for_types, jit, put

STREAMS = HAS_BF16_DOT  # without that instruction oneDNN is faster
_NO_BIAS = {dtype: view(torch.empty(0, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """[T, N], summed in float32 and rounded once."""
    out = torch.empty((x_TD.shape[0], weight_ND.shape[0]), dtype=x_TD.dtype)
    bias = _NO_BIAS[x_TD.dtype] if bias_N is None else view(bias_N)
    _linear(view(x_TD.contiguous()), view(weight_ND), bias, view(out))
    return out


@jit(*for_types("void(T[:,::1], T[:,::1], T[::1], T[:,::1])"))
def _linear(x, weight, bias, out):
    T = x.shape[0]
    groups = -(-T // MOST_ROWS)
    own = np.zeros((groups * MOST_ROWS, x.shape[1]), x.dtype)
    total = np.empty((groups * MOST_ROWS, len(weight)), np.float32)
    own[:T] = x
    for first in range(0, T, MOST_ROWS):
        products(weight, own[first:], min(MOST_ROWS, T - first), total[first:])
    for t in range(T):
        to, row = out[t], total[t]
        if len(bias):
            for n in range(len(row)):
                put(to, n, row[n] + f32(bias[n]))
        else:
            for n in range(len(row)):
                put(to, n, row[n])
