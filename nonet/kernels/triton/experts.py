"""Experts as two grouped products over addresses: a slot is an address, so slots may lie anywhere.

With few rows a slot the weight's tile stands on the left (the tensor cores want 64 or 128 rows there), with many the
rows do. Specified by `moe.experts.reference`; used by `moe.experts.triton`. Weights in FP8 have `experts_fp8`.
Legend: M pairs (an upper bound), S slots, D hidden, I intermediate; BM pairs, BN outputs and BK inputs of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton import INTERPRETED
from nonet.kernels.triton.early import early, wait_for_the_kernel_before
from nonet.kernels.triton.tiling import (
    Tile,
    at,
    count_blocks,
    find,
    gathered,
    part,
    programs,
)

ALPHA, LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)  # of the clamped activation, as gpt-oss has them


def gate_up(
    x_ND: Tensor, row_M: Tensor, start_S: Tensor, count_S: Tensor, address_S: Tensor, width: int, tile: Tile,
    bias_S: Tensor | None = None, clamped: bool = False,
) -> Tensor:  # fmt: skip
    """[M, I]: the activation of gate and up of each pair, silu(gate) * up unless `clamped`.

    address_S, int64: of weights [2I, D] in x's dtype, gate above up; bias_S: of their biases [2I].
    """
    M, D, S = row_M.shape[0], x_ND.shape[1], address_S.shape[0]
    out = torch.empty((M, width), dtype=x_ND.dtype, device=x_ND.device)
    _gate_up[(programs(M, S, triton.cdiv(width, tile.BN), tile, x_ND.device),)](
        x_ND, row_M, start_S, count_S, address_S, bias_S, out, S, D, width, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, CLAMPED=clamped, LOOP=tile.each > 0, HALVE=tile.halve,
        WIDE=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages, **early(x_ND.device),
    )  # fmt: skip
    return out


def down(
    act_MI: Tensor, start_S: Tensor, count_S: Tensor, address_S: Tensor, hidden: int, tile: Tile,
    bias_S: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[M, D], unweighted. address_S: of weights [D, I]; bias_S: of biases [D].

    Comes right after `gate_up`: it looks at the counts before that has ended.
    """
    M, width, S = act_MI.shape[0], act_MI.shape[1], address_S.shape[0]
    out = torch.empty((M, hidden), dtype=act_MI.dtype, device=act_MI.device)
    _down[(programs(M, S, triton.cdiv(hidden, tile.BN), tile, act_MI.device),)](
        act_MI, start_S, count_S, address_S, bias_S, out, S, hidden, width, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, LOOP=tile.each > 0, HALVE=tile.halve, WIDE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages, **early(act_MI.device),
    )  # fmt: skip
    return out


def sum_pairs(y_MD: Tensor, pair_NK: Tensor, weight_M: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, D] in y's dtype, in `out` if given: each row's weighted pairs, added in k order in float32, rounded once."""
    (N, K), D = pair_NK.shape, y_MD.shape[1]
    out = torch.empty((N, D), dtype=y_MD.dtype, device=y_MD.device) if out is None else out
    if N:
        width = min(256 if N < 64 else 1024, triton.next_power_of_2(D))
        grid = N, triton.cdiv(D, width)
        _sum_pairs[grid](y_MD, pair_NK, weight_M, out, D, K=K, BD=width, num_warps=4, **early(y_MD.device))
    return out


@triton.jit
def _product(w, x, total, SWAP: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x.T, total, input_precision="ieee") if SWAP else tl.dot(x, w.T, total, input_precision="ieee")


@triton.jit
def _activation(gate, up, CLAMPED: tl.constexpr):
    if CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        act = gate / (1.0 + tl.exp(-ALPHA * gate)) * up
    else:
        act = gate / (1.0 + tl.exp(-gate)) * up
    return act


@triton.jit
def _gate_up(
    x, row, start, count, address, bias, out, S, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr,
    CLAMPED: tl.constexpr, LOOP: tl.constexpr, HALVE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    blocks_S = count_blocks(start, count, S, BM, SLOTS)
    jobs = blocks_S[3] * ((width + BN - 1) // BN)
    if LOOP:
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            _gate_up_job(
                job, blocks_S, x, row, address, bias, out, D, width, BM, BN, BK, SLOTS, SWAP, HALVE, CLAMPED, WIDE
            )
    elif tl.program_id(0) < jobs:  # by itself, since a loop around costs registers
        job = tl.program_id(0)
        _gate_up_job(job, blocks_S, x, row, address, bias, out, D, width, BM, BN, BK, SLOTS, SWAP, HALVE, CLAMPED, WIDE)


@triton.jit
def _gate_up_job(
    job, blocks_S, x, row, address, bias, out, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr,
    HALVE: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (width + BN - 1) // BN
    slot, pair, left, tile = find(job, tiles, blocks_S, BM, SLOTS)
    weight, first = at(address, slot, x.dtype.element_ty), tile * BN
    own = None if bias is None else tl.load(bias + slot).to(tl.pointer_type(x.dtype.element_ty))
    if SWAP:
        _gate_up_swapped(first, x, row, weight, own, out, pair, left, D, width, BM, BN, BK, CLAMPED, WIDE)
    elif not HALVE:
        _gate_up_block(first, x, row, weight, own, out, pair, left, D, width, BM, BN, BK, CLAMPED, WIDE)
    else:
        if left <= BM // 2:
            _gate_up_block(first, x, row, weight, own, out, pair, left, D, width, BM // 2, BN, BK, CLAMPED, WIDE)
        else:
            _gate_up_block(first, x, row, weight, own, out, pair, left, D, width, BM, BN, BK, CLAMPED, WIDE)


@triton.jit
def _gate_up_swapped(
    first, x, row, weight, bias, out, pair, left, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = D % BK == 0 and width % BN == 0
    m, n = tl.arange(0, BM), first + tl.arange(0, BN)
    rows = tl.load(row + pair + m, mask=m < left, other=0)
    gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for d in range(0, D, BK):
        k = d + tl.arange(0, BK)
        x_part = gathered(x, rows, k, m < left, D, WHOLE)
        gate = _product(part(weight, n, k, D, width, WHOLE), x_part, gate, True, WIDE)
        up = _product(part(weight + width * D, n, k, D, width, WHOLE), x_part, up, True, WIDE)
    if bias is not None:
        gate += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    act = _activation(gate, up, CLAMPED).T
    to = out + (pair + m)[:, None].to(tl.int64) * width + n[None, :]
    tl.store(to, act.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] < width))


@triton.jit
def _gate_up_block(
    first, x, row, weight, bias, out, pair, left, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One product of twice the width: gate and up take turns, so that a thread holds both of a pair."""
    WHOLE: tl.constexpr = D % BK == 0 and width % BN == 0
    m, n = tl.arange(0, BM), first + tl.arange(0, BN)
    rows = tl.load(row + pair + m, mask=m < left, other=0)
    j = tl.arange(0, 2 * BN)
    both_n = first + j // 2
    both_n = tl.where(both_n < width, both_n, 0) + (j % 2) * width
    both = tl.zeros([BM, 2 * BN], tl.float32)
    for d in range(0, D, BK):
        k = d + tl.arange(0, BK)
        x_part = gathered(x, rows, k, m < left, D, WHOLE)
        both = _product(part(weight, both_n, k, D, 2 * width, WHOLE), x_part, both, False, WIDE)
    if bias is not None:
        both += tl.load(bias + both_n).to(tl.float32)[None, :]
    gate, up = tl.split(both.reshape(BM, BN, 2))
    act = _activation(gate, up, CLAMPED)
    to = out + (pair + m)[:, None].to(tl.int64) * width + n[None, :]
    tl.store(to, act.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] < width))


@triton.jit
def _down(
    act, start, count, address, bias, out, S, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr,
    LOOP: tl.constexpr, HALVE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + BN - 1) // BN
    blocks_S = count_blocks(start, count, S, BM, SLOTS)
    jobs = blocks_S[3] * tiles
    wait_for_the_kernel_before(EARLY)
    if LOOP:
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            _down_job(job, blocks_S, act, address, bias, out, D, width, BM, BN, BK, SLOTS, SWAP, HALVE, WIDE)
    elif tl.program_id(0) < jobs:
        job = tl.program_id(0)
        _down_job(job, blocks_S, act, address, bias, out, D, width, BM, BN, BK, SLOTS, SWAP, HALVE, WIDE)


@triton.jit
def _down_job(
    job, blocks_S, act, address, bias, out, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr,
    HALVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + BN - 1) // BN
    slot, pair, left, tile = find(job, tiles, blocks_S, BM, SLOTS)
    weight, first = at(address, slot, act.dtype.element_ty), tile * BN
    own = None if bias is None else tl.load(bias + slot).to(tl.pointer_type(act.dtype.element_ty))
    if SWAP or not HALVE:
        _down_block(first, act, weight, own, out, pair, left, D, width, BM, BN, BK, SWAP, WIDE)
    else:
        if left <= BM // 2:
            _down_block(first, act, weight, own, out, pair, left, D, width, BM // 2, BN, BK, SWAP, WIDE)
        else:
            _down_block(first, act, weight, own, out, pair, left, D, width, BM, BN, BK, SWAP, WIDE)


@triton.jit
def _down_block(
    first, act, weight, bias, out, pair, left, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = width % BK == 0 and D % BN == 0
    m, n = tl.arange(0, BM), first + tl.arange(0, BN)
    total = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for i in range(0, width, BK):
        k = i + tl.arange(0, BK)
        act_part = gathered(act, pair + m, k, m < left, width, WHOLE)
        total = _product(part(weight, n, k, width, D, WHOLE), act_part, total, SWAP, WIDE)
    if SWAP:
        total = total.T
    if bias is not None:
        total += tl.load(bias + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    to = out + (pair + m)[:, None].to(tl.int64) * D + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] < D))


@triton.jit
def _sum_pairs(y, pair, weight, out, D, K: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for k in tl.static_range(K):  # unrolled: the loads of all k are under way together
        p = tl.load(pair + n * K + k)
        y_part = tl.load(y + p * D + d, mask=(d < D) & (p >= 0), other=0.0).to(tl.float32)
        total += y_part * tl.load(weight + p, mask=p >= 0, other=0.0)
    tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)
