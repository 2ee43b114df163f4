"""Moving and summing rows: by router weights, into padded batches and out of them.

Specified by `moe.base.sum_pairs`, used by expert kernels and `moe.all2all.shm`. Rows that are only moved pass as words
of their size, whatever their type. Legend: see moe/base.py; C padded rows of a slot.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import f32, for_types, jit, order, put

_WORDS = {2: torch.uint16, 4: torch.uint32}


def words(x: Tensor) -> np.ndarray:
    """The elements of x as plain bits."""
    return x.view(_WORDS[x.dtype.itemsize]).numpy()


def sum_pairs(y_MD: Tensor, pair_NK: Tensor, weight_M: Tensor) -> Tensor:
    """[N, D]: each row's pairs, weighted and summed in k order; pairs -1 add nothing."""
    out = torch.empty((pair_NK.shape[0], y_MD.shape[1]), dtype=y_MD.dtype)
    _sum(view(y_MD), view(pair_NK), view(weight_M), view(out))
    return out


def argmax(x_BV: Tensor) -> list[int]:
    """The place of each row's largest value, the first of equal ones; NaN stands above all, as in PyTorch."""
    out = np.empty(x_BV.shape[0], np.int64)
    _argmax(view(x_BV), out)
    return out.tolist()


def pad(x_ND: Tensor, row_M: Tensor, start_S: Tensor, count_S: Tensor, C: int) -> Tensor:
    """[S, C, D]: the rows of each slot's pairs, then zeros."""
    out = torch.empty((count_S.shape[0], C, x_ND.shape[1]), dtype=x_ND.dtype)
    _pad(words(x_ND), view(row_M), view(start_S), view(count_S), words(out))
    return out


def collect(y_SDC: Tensor, start_S: Tensor, count_S: Tensor, out_MD: Tensor) -> None:
    """Into out, as rows: the columns of each slot that stand for its pairs."""
    _collect(words(y_SDC), view(start_S), view(count_S), words(out_MD))


@jit(*for_types("void(T[:,::1], int64[:,::1], float32[::1], T[:,::1])"))
def _sum(y, pair, weight, out):
    N, K = pair.shape
    D = y.shape[1]
    total = np.empty(D, np.float32)
    for n in range(N):
        total[:] = np.float32(0)
        for k in range(K):
            m = pair[n, k]
            if m >= 0:
                row, w = y[m], weight[m]
                for d in range(D):
                    total[d] += f32(row[d]) * w
        to = out[n]
        for d in range(D):
            put(to, d, total[d])


@jit(*for_types("void(T[:,::1], int64[::1])"))
def _argmax(x, out):
    B, V = x.shape
    for b in range(B):
        row, best, top = x[b], 0, np.int32(-(2**31))
        for first in range(0, V, 256):
            end, most = min(first + 256, V), np.int32(-(2**31))
            for v in range(first, end):
                most = max(most, order(f32(row[v])))
            if most > top:
                best, top = first, most
        while order(f32(row[best])) != top:
            best += 1
        out[b] = best


@jit(*(f"void({t}[:,::1], int64[::1], int64[::1], int64[::1], {t}[:,:,::1])" for t in ("uint16", "uint32")))
def _pad(x, row, start, count, out):
    S, C, _ = out.shape
    for s in range(S):
        for c in range(C):
            if c < count[s]:
                out[s, c] = x[row[start[s] + c]]
            else:
                out[s, c] = 0


@jit(*(f"void({t}[:,:,::1], int64[::1], int64[::1], {t}[:,::1])" for t in ("uint16", "uint32")))
def _collect(y, start, count, out):
    S, D, _ = y.shape
    for s in range(S):
        for first in range(0, count[s], 16):  # in squares that stay in the nearest cache
            end = min(first + 16, count[s])
            for left in range(0, D, 64):
                for c in range(first, end):
                    to = out[start[s] + c]
                    for d in range(left, min(left + 64, D)):
                        to[d] = y[s, d, c]
