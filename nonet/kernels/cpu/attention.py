"""Around attention on CPUs: norm and rotation of q and k with the write to the cache, and decoding from the cache.

Specified by `layers.attention`. Legend: T tokens, H query heads, h KV heads, d head_dim, B decoding sequences,
N blocks of the longest context.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.scalar import FAST, exp, f32, for_types, jit, put

_NO_NORM = np.float32(-1)
_NO_SINKS = np.empty(0, np.float32)
_ALL = 1 << 62  # no context is longer


def place_qkv(
    qkv: Tensor,
    norm: tuple[Tensor, float] | None,
    cos_sin: tuple[Tensor, Tensor],
    cache: tuple[Tensor, ...],
    place_T: Tensor,
    num_heads: int,
) -> Tensor:
    """q [T, H, d], normed and rotated, of qkv [T, H + 2h, d]; k, also so, and v go to their places in the cache.

    `norm` is (weights [H + h, d], epsilon). cos and sin are [T, 1, d].
    """
    T, _, d = qkv.shape
    q = torch.empty((T, num_heads, d), dtype=qkv.dtype)
    cos, sin = (view(part).reshape(T, d) for part in cos_sin)
    if norm is None:
        weight, eps = np.empty((0, d), cos.dtype), _NO_NORM
    else:
        weight, eps = view(norm[0]), np.float32(norm[1])
    _place(view(qkv), weight, eps, cos, sin, view(place_T), view(q), view(cache[0]), view(cache[1]))
    return q


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
) -> None:
    """Into out: each sequence's one token attends to its context, the first length_B places of its blocks.

    window, chunk, sink_H (float32) and scale are those of `layers.attention.Sight`.
    """
    blocks = view(block_BN), view(length_B), block_size
    sight = window or _ALL, chunk or _ALL, _NO_SINKS if sink_H is None else view(sink_H)
    factor = 1 / math.sqrt(q_BHd.shape[2]) if scale is None else scale
    _decode(view(q_BHd), view(cache[0]), view(cache[1]), *blocks, *sight, factor, view(out_BHd))


@jit(
    *for_types(
        "void(T[:,:,::1], T[:,::1], float32, T[:,::1], T[:,::1], int64[::1], T[:,:,::1], T[:,:,::1], T[:,:,::1])"
    )
)
def _place(qkv, weight, eps, cos, sin, place, q, keys, values):
    T, heads, d = qkv.shape
    H, h, half = q.shape[1], keys.shape[1], d // 2
    turned = np.empty(d, np.float32)
    for t in range(T):
        c, s = cos[t], sin[t]
        for head in range(H + h):
            row = qkv[t, head]
            if eps >= 0:
                square = np.float32(0)
                for i in range(d):
                    square += f32(row[i]) * f32(row[i])
                scale = np.float32(1) / np.sqrt(square / np.float32(d) + eps)
                w = weight[head]
                for i in range(d):
                    turned[i] = f32(row[i]) * scale * f32(w[i])
            else:
                for i in range(d):
                    turned[i] = f32(row[i])
            to = q[t, head] if head < H else keys[place[t], head - H]
            for i in range(half):
                put(to, i, turned[i] * f32(c[i]) - turned[i + half] * f32(s[i]))
                put(to, i + half, turned[i + half] * f32(c[i + half]) + turned[i] * f32(s[i + half]))
        for head in range(h):
            values[place[t], head] = qkv[t, H + h + head]


@njit(fastmath=FAST, inline="always")
def _widen(cache, block, size, head, first, end, rows):
    """Four places of a context in float32; zeros past its end."""
    for k in range(4):
        c = first + k
        if c < end:
            row = cache[block[c // size] * size + c % size, head]
            for i in range(len(row)):
                rows[k, i] = f32(row[i])
        else:
            rows[k] = np.float32(0)


@njit(fastmath=FAST, inline="always")
def _softmax(score, sink):
    """Of the scores and one more that is dropped; -inf for none."""
    top = sink
    for c in range(len(score)):
        top = max(top, score[c])
    mass = exp(sink - top) if sink > np.float32(-np.inf) else np.float32(0)
    for c in range(len(score)):
        score[c] = exp(score[c] - top)
        mass += score[c]
    for c in range(len(score)):
        score[c] /= mass


@jit(
    *for_types(
        "void(T[:,:,::1], T[:,:,::1], T[:,:,::1], int64[:,::1], int64[::1], int64, int64, int64, float32[::1],"
        " float32, T[:,:,::1])"
    )
)
def _decode(q, keys, values, blocks, length, size, window, chunk, sink, factor, out):
    B, H, d = q.shape
    h = keys.shape[1]
    G = H // h  # query heads that share a KV head
    query, total = np.empty((G, d), np.float32), np.empty((G, d), np.float32)
    rows = np.empty((4, d), np.float32)
    weight = np.empty((G, blocks.shape[1] * size + 3), np.float32)
    for b in range(B):
        C = length[b]
        seen = max(C - window, (C - 1) // chunk * chunk, 0)  # the first position that is
        for shared in range(h):
            for g in range(G):
                for i in range(d):
                    query[g, i] = f32(q[b, shared * G + g, i]) * factor
            for first in range(seen, C, 4):  # four keys or values at a time: sums and queries are loaded once for them
                _widen(keys, blocks[b], size, shared, first, C, rows)
                for g in range(G):
                    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                    for i in range(d):
                        s0 += query[g, i] * rows[0, i]
                        s1 += query[g, i] * rows[1, i]
                        s2 += query[g, i] * rows[2, i]
                        s3 += query[g, i] * rows[3, i]
                    weight[g, first], weight[g, first + 1] = s0, s1
                    weight[g, first + 2], weight[g, first + 3] = s2, s3
            for g in range(G):
                _softmax(weight[g, seen:C], sink[shared * G + g] if len(sink) else np.float32(-np.inf))
                weight[g, C : C + 3] = np.float32(0)
            total[:] = np.float32(0)
            for first in range(seen, C, 4):
                _widen(values, blocks[b], size, shared, first, C, rows)
                for g in range(G):
                    w0, w1, w2, w3 = weight[g, first], weight[g, first + 1], weight[g, first + 2], weight[g, first + 3]
                    for i in range(d):
                        total[g, i] += w0 * rows[0, i] + w1 * rows[1, i] + w2 * rows[2, i] + w3 * rows[3, i]
            for g in range(G):
                to = out[b, shared * G + g]
                for i in range(d):
                    put(to, i, total[g, i])
