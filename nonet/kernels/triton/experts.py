"""Experts as two grouped products over addresses: a slot is an address, so slots may lie anywhere.

Programs take (block of a slot's pairs, tile of outputs); each finds its slot by counting blocks, so nothing is mapped
before and nothing read on the host. With few rows a slot the weight's tile stands on the left (the tensor cores want 64
or 128 rows there), with many the rows do. Specified by `moe.experts.reference`.
Legend: M pairs (an upper bound), S slots, D hidden, I intermediate; BM pairs, BN outputs and BK inputs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton import INTERPRETED


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut up. `swap`: the weight on the left."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    swap: bool


def gate_up(
    x_ND: Tensor, row_M: Tensor, start_S: Tensor, count_S: Tensor, address_S: Tensor, width: int, tile: Tile
) -> Tensor:
    """[M, I]: silu(gate) * up of each pair. address_S, int64: of weights [2I, D] in x's dtype, gate above up."""
    M, D, S = row_M.shape[0], x_ND.shape[1], address_S.shape[0]
    out = torch.empty((M, width), dtype=x_ND.dtype, device=x_ND.device)
    blocks = _most_blocks(M, S, tile.BM)
    _gate_up[(blocks * triton.cdiv(width, tile.BN),)](
        x_ND, row_M, start_S, count_S, address_S, out, S, D, width, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, WHOLE=D % tile.BK == 0 and width % tile.BN == 0,
        WIDE=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def down(act_MI: Tensor, start_S: Tensor, count_S: Tensor, address_S: Tensor, hidden: int, tile: Tile) -> Tensor:
    """[M, D], unweighted. address_S: of weights [D, I]."""
    M, width, S = act_MI.shape[0], act_MI.shape[1], address_S.shape[0]
    out = torch.empty((M, hidden), dtype=act_MI.dtype, device=act_MI.device)
    blocks = _most_blocks(M, S, tile.BM)
    _down[(blocks * triton.cdiv(hidden, tile.BN),)](
        act_MI, start_S, count_S, address_S, out, S, hidden, width, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        SLOTS=triton.next_power_of_2(S), SWAP=tile.swap, WHOLE=width % tile.BK == 0 and hidden % tile.BN == 0,
        WIDE=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def sum_pairs(y_MD: Tensor, pair_NK: Tensor, weight_M: Tensor) -> Tensor:
    """[N, D] in y's dtype: each row's weighted pairs, added in k order in float32, rounded once."""
    (N, K), D = pair_NK.shape, y_MD.shape[1]
    out = torch.empty((N, D), dtype=y_MD.dtype, device=y_MD.device)
    if N:
        width = min(256 if N < 64 else 1024, triton.next_power_of_2(D))
        grid = N, triton.cdiv(D, width)
        _sum_pairs[grid](y_MD, pair_NK, weight_M, out, D, K=K, BD=width, num_warps=4)
    return out


def _most_blocks(M: int, S: int, BM: int) -> int:
    """Blocks there can be at most: a slot's last one may be partly empty, but has a pair."""
    return max(1, min(M, M // BM + S))


@triton.jit
def _find(start, count, S, BM: tl.constexpr, SLOTS: tl.constexpr, tiles):
    """(slot, its first pair in this block, pairs that are left; 0 if there is no such block) of this program."""
    block = tl.program_id(0) // tiles
    s = tl.arange(0, SLOTS)
    number = tl.load(count + s, mask=s < S, other=0).to(tl.int32)
    blocks = (number + BM - 1) // BM
    end = tl.cumsum(blocks, axis=0)
    slot = tl.sum((end <= block).to(tl.int32), axis=0)
    first = tl.sum(tl.where(s == slot, end - blocks, 0), axis=0)
    own = tl.sum(tl.where(s == slot, number, 0), axis=0)
    left = own - (block - first) * BM
    begin = tl.load(start + slot, mask=slot < S, other=0).to(tl.int32) + (block - first) * BM
    return slot, begin, tl.where(slot < S, left, 0)


@triton.jit
def _weights(address, slot, like):
    """The pointer to a slot's weight. Without the hints loads are of single numbers."""
    where = tl.multiple_of(tl.load(address + slot), 16)
    return tl.multiple_of(where.to(like.dtype), 16)


@triton.jit
def _part(pointer, rows, columns, width, height, WHOLE: tl.constexpr):
    """A tile of a weight [height, width]."""
    at = pointer + rows[:, None].to(tl.int64) * width + columns[None, :]
    return tl.load(at) if WHOLE else tl.load(at, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0.0)


@triton.jit
def _rows(x, rows, columns, here, width, WHOLE: tl.constexpr):
    """A tile of gathered rows, zeros where there is none."""
    mask = here[:, None] if WHOLE else here[:, None] & (columns[None, :] < width)
    return tl.load(x + rows[:, None].to(tl.int64) * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _product(w, x, total, SWAP: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x.T, total, input_precision="ieee") if SWAP else tl.dot(x, w.T, total, input_precision="ieee")


@triton.jit
def _gate_up(
    x, row, start, count, address, out, S, D, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLOTS: tl.constexpr, SWAP: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BN)
    slot, begin, left = _find(start, count, S, BM, SLOTS, tiles)
    if left > 0:
        m, n = tl.arange(0, BM), (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
        rows = tl.load(row + begin + m, mask=m < left, other=0)
        weight = _weights(address, slot, x)
        if SWAP:
            gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
            for d in range(0, D, BK):
                k = d + tl.arange(0, BK)
                part = _rows(x, rows, k, m < left, D, WHOLE)
                gate = _product(_part(weight, n, k, D, width, WHOLE), part, gate, SWAP, WIDE)
                up = _product(_part(weight + width * D, n, k, D, width, WHOLE), part, up, SWAP, WIDE)
            act = (gate / (1.0 + tl.exp(-gate)) * up).T
        else:  # one product of twice the width: gate and up take turns, so that a thread holds both of a pair
            j = tl.arange(0, 2 * BN)
            both_n = (tl.program_id(0) % tiles) * BN + j // 2
            both_n = tl.where(both_n < width, both_n, 0) + (j % 2) * width
            both = tl.zeros([BM, 2 * BN], tl.float32)
            for d in range(0, D, BK):
                k = d + tl.arange(0, BK)
                part = _rows(x, rows, k, m < left, D, WHOLE)
                both = _product(_part(weight, both_n, k, D, 2 * width, WHOLE), part, both, SWAP, WIDE)
            gate, up = tl.split(both.reshape(BM, BN, 2))
            act = gate / (1.0 + tl.exp(-gate)) * up
        to = out + (begin + m)[:, None].to(tl.int64) * width + n[None, :]
        tl.store(to, act.to(out.dtype.element_ty), mask=(m[:, None] < left) & (n[None, :] < width))


@triton.jit
def _down(
    act, start, count, address, out, S, D, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLOTS: tl.constexpr, SWAP: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BN)
    slot, begin, left = _find(start, count, S, BM, SLOTS, tiles)
    if left > 0:
        m, n = tl.arange(0, BM), (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
        pairs = begin + m
        weight = _weights(address, slot, act)
        total = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        for i in range(0, width, BK):
            k = i + tl.arange(0, BK)
            part = _rows(act, pairs, k, m < left, width, WHOLE)
            total = _product(_part(weight, n, k, width, D, WHOLE), part, total, SWAP, WIDE)
        if SWAP:
            total = total.T
        mask = (m[:, None] < left) & (n[None, :] < D)
        tl.store(out + pairs[:, None].to(tl.int64) * D + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_pairs(y, pair, weight, out, D, K: tl.constexpr, BD: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for k in tl.static_range(K):  # unrolled: the loads of all k are under way together
        p = tl.load(pair + n * K + k)
        part = tl.load(y + p * D + d, mask=(d < D) & (p >= 0), other=0.0).to(tl.float32)
        total += part * tl.load(weight + p, mask=p >= 0, other=0.0)
    tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)
