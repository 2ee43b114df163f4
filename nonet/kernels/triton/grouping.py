"""A stable counting sort of (row, slot) pairs by slot, on the device, in one launch for few pairs and two for many.

Specified by `moe.base.group_by_slot_reference`. Pairs are cut into chunks; each program counts the chunks before its
own and places its pairs behind theirs, so the order is that of the pairs, whatever runs first.
Legend: N rows, K slots a row, P = N x K pairs, S slots, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A chunk is a program's; it compares a part of it at a time with all slots, and reads the counts of all chunks, some
# rows at a time: (pairs of a chunk, of a part, rows), fastest on an H100 up to so many pairs, and beyond.
FEWEST, LIMIT, FEW, MANY = 16, 8192, (128, 128, 8), (512, 64, 32)


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
    most, part, rows = FEW if P <= LIMIT else MANY
    chunk = min(most, max(FEWEST, triton.next_power_of_2(P)))
    chunks = max(1, triton.cdiv(P, chunk))
    slot_NK, weight_NK = slot_NK.contiguous(), weight_NK.contiguous()
    slots = triton.next_power_of_2(max(1, num_slots))
    shape = dict(P=P, K=K, S=num_slots, CHUNK=chunk, PART=min(part, chunk), SLOTS=slots)
    counts = torch.empty((chunks, num_slots), dtype=torch.int32, device=device)
    if chunks > 1:
        _count[(chunks,)](slot_NK, counts, num_warps=4, **shape)
        _place[(chunks,)](
            slot_NK, weight_NK, counts, row, weight, pair, start, count, chunks, ROWS=rows, num_warps=4, **shape
        )
    else:
        _place_all[(1,)](slot_NK, weight_NK, row, weight, pair, start, count, num_warps=4, **shape)
    return row, weight, pair, start, count


@triton.jit
def _own(slot, p, P, S):
    """The slots of pairs p, S for those elsewhere."""
    own = tl.load(slot + p, mask=p < P, other=-1)
    return tl.where((own >= 0) & (own < S), own, S).to(tl.int32)


@triton.jit
def _count(slot, counts, P, K, S, CHUNK: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr):
    s = tl.arange(0, SLOTS)
    number = tl.zeros([SLOTS], tl.int32)
    for part in range(0, CHUNK, PART):
        own = _own(slot, tl.program_id(0) * CHUNK + part + tl.arange(0, PART), P, S)
        number += tl.sum((own[:, None] == s[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * S + s, number, mask=s < S)


@triton.jit
def _place(
    slot, weight, counts, row_out, weight_out, pair_out, start_out, count_out, chunks,
    P, K, S, CHUNK: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    s, c = tl.arange(0, SLOTS), tl.arange(0, ROWS)
    before, total = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    for first in range(0, chunks, ROWS):
        chunk = first + c
        mask = (chunk[:, None] < chunks) & (s[None, :] < S)
        number = tl.load(counts + chunk[:, None] * S + s[None, :], mask=mask, other=0)
        total += tl.sum(number, axis=0)
        before += tl.sum(tl.where(chunk[:, None] < me, number, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    if me == 0:
        tl.store(start_out + s, start.to(tl.int64), mask=s < S)
        tl.store(count_out + s, total.to(tl.int64), mask=s < S)
    place_S = start + before  # where the next pair of each slot goes
    for part in range(0, CHUNK, PART):
        p = me * CHUNK + part + tl.arange(0, PART)
        own = _own(slot, p, P, S)
        is_own = (own[:, None] == s[None, :]).to(tl.int32)
        rank = tl.cumsum(is_own, axis=0) - is_own  # pairs of this part before, with the same slot
        place = tl.sum(is_own * (rank + place_S[None, :]), axis=1)
        place_S += tl.sum(is_own, axis=0)
        here = own < S
        tl.store(pair_out + p, tl.where(here, place, -1).to(tl.int64), mask=p < P)
        tl.store(row_out + place, (p // K).to(tl.int64), mask=here)
        tl.store(weight_out + place, tl.load(weight + p, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _place_all(
    slot, weight, row_out, weight_out, pair_out, start_out, count_out,
    P, K, S, CHUNK: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The same where one program has all pairs: it counts them itself."""
    p, s = tl.arange(0, CHUNK), tl.arange(0, SLOTS)
    own = _own(slot, p, P, S)
    is_own = (own[:, None] == s[None, :]).to(tl.int32)
    total = tl.sum(is_own, axis=0)
    start = tl.cumsum(total, axis=0) - total
    tl.store(start_out + s, start.to(tl.int64), mask=s < S)
    tl.store(count_out + s, total.to(tl.int64), mask=s < S)
    place = tl.sum(is_own * (tl.cumsum(is_own, axis=0) - is_own + start[None, :]), axis=1)
    here = own < S
    tl.store(pair_out + p, tl.where(here, place, -1).to(tl.int64), mask=p < P)
    tl.store(row_out + place, (p // K).to(tl.int64), mask=here)
    tl.store(weight_out + place, tl.load(weight + p, mask=here, other=0.0).to(tl.float32), mask=here)
