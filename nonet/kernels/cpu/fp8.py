"""Weights in e4m3 to numbers, with a factor for each block, in one pass. Specified by `kernels.fp8.dequantize`.

Each block has a table of what the 256 numbers there are become in it. Legend: N rows, K columns, n, k blocks of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import for_types, jit, put

_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def dequantize(weight: Tensor, scale: Tensor, block: int, first: tuple[int, int], out: Tensor) -> None:
    """weight and out [N, K], scale [n, k], all contiguous; the same bits as the specification's."""
    _dequantize(weight.view(torch.uint8).numpy(), scale.numpy(), block, *first, _NUMBERS, view(out))


@jit(*for_types("void(uint8[:,::1], float32[:,::1], int64, int64, int64, float32[::1], T[:,::1])"))
def _dequantize(weight, scale, block, first_row, first_column, numbers, out):
    N, K = weight.shape
    blocks = scale.shape[1]
    tables = np.empty((blocks, 256), out.dtype)
    for n in range(len(scale)):
        top, bottom = max(0, n * block - first_row), min((n + 1) * block - first_row, N)
        for k in range(blocks if top < bottom else 0):
            for i in range(256):
                put(tables[k], i, numbers[i] * scale[n, k])
        for r in range(top, bottom):
            row, to = weight[r], out[r]
            for k in range(blocks):
                table = tables[k]
                for c in range(max(0, k * block - first_column), min((k + 1) * block - first_column, K)):
                    to[c] = table[row[c]]
