"""Experts in block FP8 as two grouped products: `experts` with weights and rows in e4m3, factors of both in float32.

A weight has a factor for each 128 x 128 numbers, a row one for each 128 columns, found as it is met (DeepSeek-V3's
report, arXiv:2412.19437, section 3.3). The tensor cores sum 128 columns; each such part is multiplied by its two
factors and added in float32, since their own sums are narrow. Specified by `kernels.fp8.quantize_rows` before each
product of `moe.experts.reference`.
Legend: see experts.py; d, i blocks of D and I.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.fp8 import FP8, ROW_BLOCK
from nonet.kernels.triton import INTERPRETED
from nonet.kernels.triton.early import early, wait_for_the_kernel_before
from nonet.kernels.triton.fp8 import quantized
from nonet.kernels.triton.tiling import (
    Tile,
    at,
    count_blocks,
    find,
    gathered,
    part,
    programs,
)

BLOCK = ROW_BLOCK  # of weights too
_BLOCK = tl.constexpr(BLOCK)


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, D], float32 factors [N, d]): the largest number of each 128 columns of a row becomes 448.

    Specified by `kernels.fp8.quantize_rows`; here the last columns may be fewer.
    """
    N, D = x_ND.shape
    out = torch.empty((N, D), dtype=FP8, device=x_ND.device)
    scale_Nd = torch.empty((N, triton.cdiv(D, BLOCK)), device=x_ND.device)
    if N:
        blocks = min(16 if N >= 64 else 1, triton.next_power_of_2(scale_Nd.shape[1]))
        grid = N, triton.cdiv(scale_Nd.shape[1], blocks)
        _quantize_rows[grid](x_ND, out, scale_Nd, D, BLOCKS=blocks, num_warps=4, **early(x_ND.device))
    return out, scale_Nd


def gate_up(
    x_ND: Tensor, scale_Nd: Tensor, row_M: Tensor, start_S: Tensor, count_S: Tensor,
    address_S: Tensor, scale_address_S: Tensor, width: int, tile: Tile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """silu(gate) * up of each pair, quantised: (e4m3 [M, I], factors [M, i]).

    int64 addresses: of e4m3 weights [2I, D], gate above up, and of their factors [2, i, d]. tile.BN is 128.
    """
    M, D, S = row_M.shape[0], x_ND.shape[1], address_S.shape[0]
    out = torch.empty((M, width), dtype=FP8, device=x_ND.device)
    scale_Mi = torch.empty((M, triton.cdiv(width, BLOCK)), device=x_ND.device)
    _gate_up[(programs(M, S, triton.cdiv(width, BLOCK), tile, x_ND.device),)](
        x_ND, scale_Nd, row_M, start_S, count_S, address_S, scale_address_S, out, scale_Mi, S, D, width,
        BM=tile.BM, BK=tile.BK, SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, LOOP=tile.each > 0,
        HALVE=tile.halve, WIDE=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages, **early(x_ND.device),
    )  # fmt: skip
    return out, scale_Mi


def down(
    act_MI: Tensor, scale_Mi: Tensor, start_S: Tensor, count_S: Tensor, address_S: Tensor, scale_address_S: Tensor,
    hidden: int, tile: Tile, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[M, D] in `dtype`, unweighted. Addresses: of e4m3 weights [D, I] and of their factors [d, i].

    Comes right after `gate_up`: it looks at the counts before that has ended.
    """
    M, width, S = act_MI.shape[0], act_MI.shape[1], address_S.shape[0]
    out = torch.empty((M, hidden), dtype=dtype, device=act_MI.device)
    if tile.BN > BLOCK and triton.cdiv(hidden, BLOCK) % 2:  # a tile of two blocks would reach past the weight
        tile = replace(tile, BN=BLOCK)
    _down[(programs(M, S, triton.cdiv(hidden, tile.BN), tile, act_MI.device),)](
        act_MI, scale_Mi, start_S, count_S, address_S, scale_address_S, out, S, hidden, width,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, LOOP=tile.each > 0,
        HALVE=tile.halve, WIDE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages, **early(act_MI.device),
    )  # fmt: skip
    return out


@triton.jit
def _quantize_rows(x, out, scale, D, BLOCKS: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    eight, factor = quantized(tl.load(x + row * D + k, mask=k < D, other=0.0).to(tl.float32))
    tl.store(out + row * D + k, eight, mask=k < D)
    blocks = tl.cdiv(D, _BLOCK)
    tl.store(scale + row * blocks + block, factor, mask=block < blocks)


@triton.jit
def _add(total, w, x, factor, SWAP: tl.constexpr, WIDE: tl.constexpr):
    """One block of columns more."""
    if WIDE:
        w, x = w.to(tl.float32), x.to(tl.float32)
    if SWAP:
        total += tl.dot(w, x.T, input_precision="ieee") * factor[None, :]
    else:
        total += tl.dot(x, w.T, input_precision="ieee") * factor[:, None]
    return total


@triton.jit
def _factor(scale, b, blocks: tl.constexpr, WHOLE: tl.constexpr):
    return tl.load(scale + b) if WHOLE else tl.load(scale + b, mask=b < blocks, other=0.0)


@triton.jit
def _products(
    x, x_scale, rows, here, first, second, n1, n2, scale1, scale2, depth: tl.constexpr, height: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of rows times the rows n1 of a weight and, if TWO, n2 of a second; each inside one block of rows."""
    blocks: tl.constexpr = (depth + 127) // 128
    AT_ONCE: tl.constexpr = BK // 128
    WHOLE: tl.constexpr = depth // BK * BK == depth and height // BN * BN == height
    total1 = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    total2 = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for first_b in range(0, blocks, AT_ONCE):
        for u in tl.static_range(AT_ONCE):
            b = first_b + u
            k = b * _BLOCK + tl.arange(0, _BLOCK)
            x_part = gathered(x, rows, k, here, depth, WHOLE)
            known = here if WHOLE else here & (b < blocks)
            factor = tl.load(x_scale + rows.to(tl.int64) * blocks + b, mask=known, other=0.0)
            w = part(first, n1, k, depth, height, WHOLE)
            total1 = _add(total1, w, x_part, factor * _factor(scale1, b, blocks, WHOLE), SWAP, WIDE)
            if TWO:
                w = part(second, n2, k, depth, height, WHOLE)
                total2 = _add(total2, w, x_part, factor * _factor(scale2, b, blocks, WHOLE), SWAP, WIDE)
    if SWAP:
        total1, total2 = total1.T, total2.T
    return total1, total2


@triton.jit
def _gate_up(
    x, x_scale, row, start, count, address, scale_address, out, out_scale, S, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr, LOOP: tl.constexpr,
    HALVE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    i: tl.constexpr = (width + 127) // 128
    wait_for_the_kernel_before(EARLY)
    blocks_S = count_blocks(start, count, S, BM, SLOTS)
    jobs = blocks_S[3] * i
    if LOOP:
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            _gate_up_job(
                job, blocks_S, x, x_scale, row, address, scale_address, out, out_scale, D, width,
                BM, BK, SLOTS, SWAP, HALVE, WIDE,
            )  # fmt: skip
    elif tl.program_id(0) < jobs:  # by itself, since a loop around costs registers
        job = tl.program_id(0)
        _gate_up_job(
            job, blocks_S, x, x_scale, row, address, scale_address, out, out_scale, D, width,
            BM, BK, SLOTS, SWAP, HALVE, WIDE,
        )  # fmt: skip


@triton.jit
def _gate_up_job(
    job, blocks_S, x, x_scale, row, address, scale_address, out, out_scale, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr, HALVE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (width + 127) // 128
    slot, pair, left, tile = find(job, tiles, blocks_S, BM, SLOTS)
    weight = at(address, slot, tl.float8e4nv)
    scale = tl.load(scale_address + slot).to(tl.pointer_type(tl.float32))
    if SWAP or not HALVE:
        _gate_up_block(tile, x, x_scale, row, weight, scale, out, out_scale, pair, left, D, width, BM, BK, SWAP, WIDE)
    else:
        if left <= BM // 2:
            _gate_up_block(
                tile, x, x_scale, row, weight, scale, out, out_scale, pair, left, D, width, BM // 2, BK, SWAP, WIDE
            )
        else:
            _gate_up_block(
                tile, x, x_scale, row, weight, scale, out, out_scale, pair, left, D, width, BM, BK, SWAP, WIDE
            )


@triton.jit
def _gate_up_block(
    tile, x, x_scale, row, weight, scale, out, out_scale, pair, left, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    d: tl.constexpr = (D + 127) // 128
    i: tl.constexpr = (width + 127) // 128
    m, n = tl.arange(0, BM), tile * _BLOCK + tl.arange(0, _BLOCK)
    rows = tl.load(row + pair + m, mask=m < left, other=0)
    scale += tile * d
    gate, up = _products(
        x, x_scale, rows, m < left, weight, weight + width * D, n, n, scale, scale + i * d, D, width,
        BM, 128, BK, True, SWAP, WIDE,
    )  # fmt: skip
    act = tl.where(n[None, :] < width, gate / (1.0 + tl.exp(-gate)) * up, 0.0)
    eight, factor = quantized(act)
    pairs = (pair + m).to(tl.int64)
    tl.store(out + pairs[:, None] * width + n[None, :], eight, mask=(m[:, None] < left) & (n[None, :] < width))
    tl.store(out_scale + pairs * i + tile, factor, mask=m < left)


@triton.jit
def _down(
    act, act_scale, start, count, address, scale_address, out, S, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr, LOOP: tl.constexpr,
    HALVE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + BN - 1) // BN
    blocks_S = count_blocks(start, count, S, BM, SLOTS)
    jobs = blocks_S[3] * tiles
    wait_for_the_kernel_before(EARLY)
    if LOOP:
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            _down_job(
                job, blocks_S, act, act_scale, address, scale_address, out, D, width,
                BM, BN, BK, SLOTS, SWAP, HALVE, WIDE,
            )  # fmt: skip
    elif tl.program_id(0) < jobs:
        job = tl.program_id(0)
        _down_job(
            job, blocks_S, act, act_scale, address, scale_address, out, D, width,
            BM, BN, BK, SLOTS, SWAP, HALVE, WIDE,
        )  # fmt: skip


@triton.jit
def _down_job(
    job, blocks_S, act, act_scale, address, scale_address, out, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr, SWAP: tl.constexpr, HALVE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + BN - 1) // BN
    slot, pair, left, tile = find(job, tiles, blocks_S, BM, SLOTS)
    weight, first = at(address, slot, tl.float8e4nv), tile * BN
    scale = tl.load(scale_address + slot).to(tl.pointer_type(tl.float32))
    if SWAP or not HALVE:
        _down_block(first, act, act_scale, weight, scale, out, pair, left, D, width, BM, BN, BK, SWAP, WIDE)
    else:
        if left <= BM // 2:
            _down_block(first, act, act_scale, weight, scale, out, pair, left, D, width, BM // 2, BN, BK, SWAP, WIDE)
        else:
            _down_block(first, act, act_scale, weight, scale, out, pair, left, D, width, BM, BN, BK, SWAP, WIDE)


@triton.jit
def _down_block(
    first, act, act_scale, weight, scale, out, pair, left, D: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TWO: tl.constexpr = BN > _BLOCK  # two blocks of outputs, each with factors of its own
    HALF: tl.constexpr = BN // 2 if TWO else BN
    i: tl.constexpr = (width + 127) // 128
    m, n = tl.arange(0, BM), first + tl.arange(0, HALF)
    y1, y2 = _products(
        act, act_scale, pair + m, m < left, weight, weight, n, n + HALF,
        scale + first // _BLOCK * i, scale + (first + HALF) // _BLOCK * i, width, D, BM, HALF, BK, TWO, SWAP, WIDE,
    )  # fmt: skip
    to = out + (pair + m)[:, None].to(tl.int64) * D + n[None, :]
    tl.store(to, y1.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] < D))
    if TWO:
        tl.store(to + HALF, y2.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] + HALF < D))
