"""A stable counting sort of (row, slot) pairs by slot, on the device, in one launch for few pairs, else two or three.

Specified by `moe.base.group_by_slot_reference`. Pairs are cut into chunks, a program each; it learns how many pairs of
each slot the chunks before its own have, and places its pairs behind theirs, so the order is that of the pairs,
whatever runs first.
Legend: N rows, K slots a row, P = N x K pairs, S slots, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before

# Up to ALONE pairs one program has them all, beyond it CHUNK; up to so many chunks each counts those before by itself.
# The fastest tried on an H100.
FEWEST, ALONE, CHUNK, CHUNKS = 32, 256, 128, 32


def group(slot_NK: Tensor, weight_NK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_M, weight_M, pair_NK, start_S, count_S) of `moe.base.Dispatched`; M = N x K. Slots outside 0 .. S - 1 are
    elsewhere: pair -1."""
    N, K = slot_NK.shape
    device, P = slot_NK.device, N * K
    row = torch.empty(P, dtype=torch.int64, device=device)
    weight = torch.empty(P, dtype=torch.float32, device=device)
    pair = torch.empty((N, K), dtype=torch.int64, device=device)
    start = torch.empty(num_slots, dtype=torch.int64, device=device)
    count = torch.empty(num_slots, dtype=torch.int64, device=device)
    slot_NK, weight_NK = slot_NK.contiguous(), weight_NK.contiguous()
    slots = triton.next_power_of_2(max(FEWEST, num_slots))
    chunk = max(FEWEST, triton.next_power_of_2(P)) if P <= ALONE else CHUNK
    chunks = max(1, triton.cdiv(P, chunk))
    shape = dict(P=P, S=num_slots, CHUNK=chunk, SLOTS=slots, num_warps=8 if chunk > 128 else 4, **early(device))
    ins, outs = (slot_NK, weight_NK), (row, weight, pair, start, count)
    if chunks == 1:
        _place_all[(1,)](*ins, *outs, K, **shape)
        return outs
    number_CS = torch.empty((chunks, num_slots), dtype=torch.int32, device=device)
    _count[(chunks,)](slot_NK, number_CS, **shape)
    few = chunks <= CHUNKS
    if not few:
        _add_up[(triton.cdiv(num_slots, 4),)](number_CS, count, chunks, num_slots, num_warps=4, **early(device))
    most = triton.next_power_of_2(chunks) if few else 1
    _place[(chunks,)](*ins, number_CS, *outs, chunks, K, MOST=most, ADDED=not few, **shape)
    return outs


@triton.jit
def _own(slot, p, P, S):
    """The slots of pairs p, S for those elsewhere."""
    own = tl.load(slot + p, mask=p < P, other=-1)
    return tl.where((own >= 0) & (own < S), own, S).to(tl.int32)


@triton.jit
def _number(own, S, SLOTS: tl.constexpr):
    """How many of these pairs each slot has."""
    return tl.histogram(own, SLOTS, mask=own < S)


@triton.jit
def _spread(p, own, next_S, slot, weight, row_out, weight_out, pair_out, P, K, S, CHUNK: tl.constexpr):
    """Put pairs p where they belong, the first of each slot at next_S."""
    other = _own(slot, p, P, S)  # the same numbers, along the other side of a square
    j = tl.arange(0, CHUNK)
    before = (own[:, None] == other[None, :]) & (j[:, None] > j[None, :])
    here = own < S
    place = tl.gather(next_S, tl.where(here, own, 0), 0) + tl.sum(before.to(tl.int32), axis=1)
    tl.store(pair_out + p, tl.where(here, place, -1).to(tl.int64), mask=p < P)
    tl.store(row_out + place, (p // K).to(tl.int64), mask=here)
    tl.store(weight_out + place, tl.load(weight + p, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _count(slot, number, P, S, CHUNK: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr):
    wait_for_the_kernel_before(EARLY)
    me, s = tl.program_id(0), tl.arange(0, SLOTS)
    own = _own(slot, me * CHUNK + tl.arange(0, CHUNK), P, S)
    tl.store(number + me * S + s, _number(own, S, SLOTS), mask=s < S)


@triton.jit
def _add_up(number, count_out, chunks, S, EARLY: tl.constexpr):
    """Each chunk's numbers become those of all chunks before it; a program does some slots."""
    wait_for_the_kernel_before(EARLY)
    s, c = tl.program_id(0) * 4 + tl.arange(0, 4), tl.arange(0, 256)
    total = tl.zeros([4], tl.int32)
    for first in range(0, chunks, 256):
        to = number + (first + c)[:, None] * S + s[None, :]
        mask = ((first + c)[:, None] < chunks) & (s[None, :] < S)
        own = tl.load(to, mask=mask, other=0)
        tl.store(to, tl.cumsum(own, axis=0) - own + total[None, :], mask=mask)
        total += tl.sum(own, axis=0)
    tl.store(count_out + s, total.to(tl.int64), mask=s < S)


@triton.jit
def _place(
    slot, weight, number, row_out, weight_out, pair_out, start_out, count_out, chunks, K,
    P, S, CHUNK: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    me, s = tl.program_id(0), tl.arange(0, SLOTS)
    if ADDED:
        total = tl.load(count_out + s, mask=s < S, other=0).to(tl.int32)
        before = tl.load(number + me * S + s, mask=s < S, other=0)
    else:
        c = tl.arange(0, MOST)
        all = tl.load(number + c[:, None] * S + s[None, :], mask=(c[:, None] < chunks) & (s[None, :] < S), other=0)
        total, before = tl.sum(all, axis=0), tl.sum(tl.where(c[:, None] < me, all, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    if me == 0:
        tl.store(start_out + s, start.to(tl.int64), mask=s < S)
        if not ADDED:
            tl.store(count_out + s, total.to(tl.int64), mask=s < S)
    p = me * CHUNK + tl.arange(0, CHUNK)
    own = _own(slot, p, P, S)
    _spread(p, own, start + before, slot, weight, row_out, weight_out, pair_out, P, K, S, CHUNK)


@triton.jit
def _place_all(
    slot, weight, row_out, weight_out, pair_out, start_out, count_out, K,
    P, S, CHUNK: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same where one program has all pairs: it counts them itself."""
    wait_for_the_kernel_before(EARLY)
    p, s = tl.arange(0, CHUNK), tl.arange(0, SLOTS)
    own = _own(slot, p, P, S)
    total = _number(own, S, SLOTS)
    start = tl.cumsum(total, axis=0) - total
    tl.store(start_out + s, start.to(tl.int64), mask=s < S)
    tl.store(count_out + s, total.to(tl.int64), mask=s < S)
    _spread(p, own, start, slot, weight, row_out, weight_out, pair_out, P, K, S, CHUNK)
