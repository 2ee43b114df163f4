"""The most likely token of each row of logits, and a drawn one. Specified by `engine.sampler.largest` and `draw`.

`argmax` cuts a row into parts, so that few rows fill the GPU; a second launch compares the parts' winners. `draw` gives
a row to a program and sorts nothing: it looks for the least probability that stays by halving what is left of its
range. Numbers that are not negative are compared by their bits. What is drawn does not depend on other rows.
Legend: B rows, N rows that are drawn, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before
from nonet.kernels.triton.routing import order

PROGRAMS, BLOCK, WARPS = 528, 2048, 8  # so many programs at least, each with blocks of so many logits at a time
DRAWN = 8192, 32  # logits at a time, and warps, of a program that draws


def argmax(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the place of each row's largest value, the first of equal ones; NaN is above all, as in PyTorch."""
    B, V = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    blocks = triton.cdiv(V, BLOCK)
    each = triton.cdiv(blocks, max(1, min(blocks, triton.cdiv(PROGRAMS, max(1, B)))))  # blocks of a part
    parts = triton.cdiv(blocks, each)
    best = torch.empty((B, parts), dtype=torch.int64, device=logits_BV.device)
    out = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    if B:
        how = early(out.device)
        _best[(B, parts)](logits_BV, best, V, each, BV=BLOCK, num_warps=WARPS, **how)
        _first[(B,)](best, out, parts, PARTS=triton.next_power_of_2(blocks), num_warps=1, **how)
    return out


def draw(logits_BV: Tensor, row_N: Tensor, setting_4N: Tensor, noise_NV: Tensor) -> Tensor:
    """int64 [N]: the tokens of rows row_N (int64), by their settings, float32: temperature, the logarithm of min_p,
    top_k, top_p. Of those that stay the one whose probability / noise (float32) is largest."""
    N, V = noise_NV.shape
    logits_BV, block = logits_BV.contiguous(), min(DRAWN[0], triton.next_power_of_2(V))
    out = torch.empty(N, dtype=torch.int64, device=logits_BV.device)
    if N:
        scratch = torch.empty_like(noise_NV)
        _draw[(N,)](logits_BV, row_N, setting_4N, noise_NV, scratch, out, N, V, BV=block, num_warps=DRAWN[1])
    return out


@triton.jit(do_not_specialize=["each"])
def _best(logits, out, V, each, BV: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    b, part, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BV)
    most, where = tl.full([BV], -(2**31), tl.int32), tl.zeros([BV], tl.int32)
    for block in range(part * each, (part + 1) * each):
        v = block * BV + i
        x = tl.load(logits + b * V + v, mask=v < V, other=-float("inf")).to(tl.float32)
        rank = tl.where(v < V, order(tl.where(x == 0, 0.0, x)), -(2**31))  # zero has no sign
        where = tl.where(rank > most, v, where)
        most = tl.maximum(rank, most)
    key = (most.to(tl.int64) << 32) | (0x7FFFFFFF - where).to(tl.int64)  # of equal ones the first is largest
    tl.store(out + b * tl.num_programs(1) + part, tl.max(key, axis=0))


@triton.jit(do_not_specialize=["parts"])
def _first(best, out, parts, PARTS: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    key = tl.max(tl.load(best + b * parts + i, mask=i < parts, other=-(2**63)), axis=0)
    tl.store(out + b, 0x7FFFFFFF - (key & 0xFFFFFFFF))


@triton.jit(do_not_specialize=["N"])
def _draw(logits, row, setting, noise, scratch, out, N, V, BV: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    temperature, log_min_p = tl.load(setting + n), tl.load(setting + N + n)
    top_k, top_p = tl.load(setting + 2 * N + n), tl.load(setting + 3 * N + n)
    x, q = logits + tl.load(row + n) * V, scratch + n * V
    most = tl.full([BV], -float("inf"), tl.float32)
    for v in range(0, V, BV):
        most = tl.maximum(most, _scaled(x, v + i, V, temperature))
    top = tl.max(most, axis=0)
    for v in range(0, V, BV):  # probabilities times a factor that makes the largest 1
        logit = _scaled(x, v + i, V, temperature)
        tl.store(q + v + i, tl.where(logit < top + log_min_p, 0.0, tl.exp(logit - top)), mask=v + i < V)
    tl.debug_barrier()
    # what stays: bits larger than `least`, and the first so many that are equal
    least, ties = tl.zeros([], tl.int32), tl.zeros([], tl.float32) + V
    if (top_k > 0) & (top_k < V):
        least = _least(q, V, least, top_k, True, BV)
    if top_p < 1:
        wanted = top_p * _above(q, V, least, False, BV)
        least = _least(q, V, least, wanted, False, BV)
        missing = wanted - _above(q, V, least + 1, False, BV)
        ties = tl.ceil(missing / least.to(tl.float32, bitcast=True))
    out_of, where, came = tl.full([BV], -1.0, tl.float32), tl.zeros([BV], tl.int32), 0
    for v in range(0, V, BV):
        own = tl.load(q + v + i, mask=v + i < V, other=-1.0)
        bits = own.to(tl.int32, bitcast=True)
        tie = (bits == least).to(tl.int32)
        stays = (bits > least) | ((tie > 0) & (came + tl.cumsum(tie, axis=0) <= ties))
        came += tl.sum(tie, axis=0)
        score = tl.where(stays, own / tl.load(noise + n * V + v + i, mask=v + i < V, other=1.0), -1.0)
        where = tl.where(score > out_of, v + i, where)
        out_of = tl.maximum(score, out_of)
    best = tl.max(out_of, axis=0)
    tl.store(out + n, tl.min(tl.where(out_of == best, where, V - 1), axis=0).to(tl.int64))


@triton.jit
def _scaled(x, v, V, temperature):
    return tl.load(x + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature


@triton.jit
def _above(q, V, least, COUNT: tl.constexpr, BV: tl.constexpr):
    """The sum of what has bits of at least `least`, or its number."""
    i, total = tl.arange(0, BV), tl.zeros([BV], tl.float32)
    for v in range(0, V, BV):
        own = tl.load(q + v + i, mask=v + i < V, other=-1.0)
        total += tl.where(own.to(tl.int32, bitcast=True) >= least, 1.0 if COUNT else own, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _least(q, V, low, wanted, COUNT: tl.constexpr, BV: tl.constexpr):
    """The largest bits above which, and with which, `wanted` or more stand; `low` if there are none."""
    high = 0x3F800001  # past those of 1
    while high - low > 1:
        middle = (low + high) // 2
        if _above(q, V, middle, COUNT, BV) >= wanted:
            low = middle
        else:
            high = middle
    return low
