"""Around attention: norm and rotation of q and k by head, with the write of k and v to the paged cache, in one pass.

`place_qkv` is specified by `layers.attention.place_qkv`, `place_latent` by what `layers.mla` does between its products.
Everything is computed in float32 and rounded once. What goes to a negative place goes nowhere, so that a graph's
padding needs no room in the cache.
Legend: T tokens, H query heads, h KV heads, d head_dim, c latent and r rotated part of a cached row, W = c + r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before

HEADS, TURNED, WARPS = 8, 32, 4  # of a program: heads, heads where a part is turned; fastest on an H100


def place_qkv(
    qkv: Tensor,
    norm: tuple[Tensor, float] | None,
    cos_sin: tuple[Tensor, Tensor],
    cache: tuple[Tensor, ...],
    place_T: Tensor,
    num_heads: int,
) -> Tensor:
    """q [T, H, d], normed and rotated, of qkv [T, H + 2h, d]; k, also so, and v go to their places in the cache.

    `norm` is (weights [H + h, d], epsilon); cos and sin are [T, 1, d]; place_T is int64.
    """
    (T, heads, d), h = qkv.shape, cache[0].shape[1]
    q = torch.empty((T, num_heads, d), dtype=qkv.dtype, device=qkv.device)
    weight, eps = (None, 0.0) if norm is None else norm
    cos, sin = (part.contiguous() for part in cos_sin)
    if T:
        _place_qkv[(T, triton.cdiv(heads, HEADS))](
            qkv.contiguous(), weight, cos, sin, place_T, q, *cache, *(part.stride(0) for part in cache), eps,
            num_heads, h, d, BH=HEADS, BF=triton.next_power_of_2(max(1, d // 2)), num_warps=WARPS,
            **early(q.device),
        )  # fmt: skip
    return q


def place_latent(
    q_THx: Tensor,
    row_TW: Tensor,
    norm: tuple[Tensor, float],
    cos_sin: tuple[Tensor, Tensor],
    cache_row: Tensor,
    place_T: Tensor,
) -> None:
    """Turn the last r numbers of each query, in place; a row's latent, normed, and its last r numbers, turned, go to
    their place of cache_row [places, 1, W].

    `norm` is (weights [c], epsilon); cos and sin are [T, 1, r]; place_T is int64. Tokens of q and rows may lie apart.
    """
    (T, H, x), W, r = q_THx.shape, row_TW.shape[1], cos_sin[0].shape[-1]
    assert q_THx.stride(2) == row_TW.stride(1) == 1
    cos, sin = (part.contiguous() for part in cos_sin)
    weight, eps = norm
    if T:
        _place_latent[(T, triton.cdiv(H, TURNED) + 1)](
            q_THx, row_TW, weight, cos, sin, place_T, cache_row, *q_THx.stride()[:2], row_TW.stride(0),
            cache_row.stride(0), eps, H, x - r, W - r, r, BH=TURNED, BC=triton.next_power_of_2(W - r),
            BF=triton.next_power_of_2(max(1, r // 2)), num_warps=WARPS, **early(q_THx.device),
        )  # fmt: skip


@triton.jit
def _place_qkv(
    qkv, weight, cos, sin, place, q, k_cache, v_cache, k_stride, v_stride, eps, H, h, d,
    BH: tl.constexpr, BF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    t = tl.program_id(0).to(tl.int64)
    head, f = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BF)
    half = d // 2
    inside = f[None, :] < half
    here = (head[:, None] < H + 2 * h) & inside
    at = (t * (H + 2 * h) + head[:, None]) * d + f[None, :]  # of the left half; the right one lies behind
    left_v, right_v = tl.load(qkv + at, mask=here, other=0.0), tl.load(qkv + at + half, mask=here, other=0.0)
    left, right = left_v.to(tl.float32), right_v.to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(left * left + right * right, axis=1) / d + eps)[:, None]
        own, normed = weight + head[:, None] * d + f[None, :], inside & (head[:, None] < H + h)
        left_w, right_w = _halves(own, half, normed)
        left, right = left * scale * left_w, right * scale * right_w
    left_cos, right_cos = _halves(cos + t * d + f[None, :], half, inside)
    left_sin, right_sin = _halves(sin + t * d + f[None, :], half, inside)
    new_left = (left * left_cos - right * left_sin).to(q.dtype.element_ty)
    new_right = (right * right_cos + left * right_sin).to(q.dtype.element_ty)
    is_q = here & (head[:, None] < H)
    to_q = q + (t * H + head[:, None]) * d + f[None, :]
    tl.store(to_q, new_left, mask=is_q)
    tl.store(to_q + half, new_right, mask=is_q)
    where = tl.load(place + t)
    if where >= 0:
        is_k = here & (head[:, None] >= H) & (head[:, None] < H + h)
        to_k = k_cache + where * k_stride + (head[:, None] - H) * d + f[None, :]
        tl.store(to_k, new_left, mask=is_k)
        tl.store(to_k + half, new_right, mask=is_k)
        is_v = here & (head[:, None] >= H + h)
        to_v = v_cache + where * v_stride + (head[:, None] - H - h) * d + f[None, :]
        tl.store(to_v, left_v, mask=is_v)
        tl.store(to_v + half, right_v, mask=is_v)


@triton.jit
def _halves(at, half, mask):
    """Both halves of heads, in float32."""
    left, right = tl.load(at, mask=mask, other=0.0), tl.load(at + half, mask=mask, other=0.0)
    return left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _place_latent(
    q, row, weight, cos, sin, place, cache, q_stride, q_head, row_stride, cache_stride, eps, H, nope, c, r,
    BH: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    t, f = tl.program_id(0).to(tl.int64), tl.arange(0, BF)
    half = r // 2
    left_cos, right_cos = _halves(cos + t * r + f, half, f < half)
    left_sin, right_sin = _halves(sin + t * r + f, half, f < half)
    if tl.program_id(1) > 0:  # queries
        head = (tl.program_id(1) - 1) * BH + tl.arange(0, BH)
        here = (head[:, None] < H) & (f[None, :] < half)
        at = q + t * q_stride + head[:, None] * q_head + nope + f[None, :]
        left, right = _halves(at, half, here)
        new_left = left * left_cos[None, :] - right * left_sin[None, :]
        tl.store(at, new_left.to(q.dtype.element_ty), mask=here)
        new_right = right * right_cos[None, :] + left * right_sin[None, :]
        tl.store(at + half, new_right.to(q.dtype.element_ty), mask=here)
    else:
        where, i = tl.load(place + t), tl.arange(0, BC)
        if where >= 0:
            own, to = row + t * row_stride, cache + where * cache_stride
            latent = tl.load(own + i, mask=i < c, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(latent * latent, axis=0) / c + eps)
            weights = tl.load(weight + i, mask=i < c, other=0.0).to(tl.float32)
            tl.store(to + i, (latent * scale * weights).to(cache.dtype.element_ty), mask=i < c)
            left, right = _halves(own + c + f, half, f < half)
            new_left = left * left_cos - right * left_sin
            tl.store(to + c + f, new_left.to(cache.dtype.element_ty), mask=f < half)
            new_right = right * right_cos + left * right_sin
            tl.store(to + c + f + half, new_right.to(cache.dtype.element_ty), mask=f < half)
