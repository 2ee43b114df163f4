"""Which replica of its expert each pair goes to, in turn, and counts of what was chosen.

Specified by `moe.lookup.Even.reference` and `moe.load`. A pair's turn is the number of earlier pairs of its expert: it
is compared with those of its chunk, and where there are many, the chunks before are counted first.
Legend: P (token, k) pairs, E experts, C most replicas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nonet.kernels.triton.early import early, wait_for_the_kernel_before

# A program places so many pairs, FEW or MANY. It compares them with all before, PART at a time; where there are more
# pairs than LIMIT, parts before its own are counted first, and their counts added, ROWS at a time. Fastest on an H100.
LIMIT, FEW, MANY, PART, ROWS = 1024, 8, 32, 128, 64
COUNTED = 512  # numbers that a program counts


def look_up(expert_TK: Tensor, slot_EC: Tensor, count_E: Tensor, first: int) -> Tensor:
    """Global slots, int64 [T, K]: the replicas of an expert in turn, beginning with number `first`. All are int64."""
    P, (E, C) = expert_TK.numel(), slot_EC.shape
    expert_TK, slot_EC = expert_TK.contiguous(), slot_EC.contiguous()
    slot, counts, how = torch.empty_like(expert_TK), None, early(expert_TK.device)
    if P > LIMIT and C > 1:
        counts = torch.empty((triton.cdiv(P, PART), E), dtype=torch.int32, device=slot.device)
        bins = triton.next_power_of_2(E)
        _count[(len(counts),)](expert_TK, counts, P, E, CHUNK=PART, BINS=bins, ADDS=False, num_warps=4, **how)
    if P:
        own = FEW if P <= LIMIT else MANY
        _look_up[(triton.cdiv(P, own),)](
            expert_TK, slot_EC, count_E, counts, slot, P, E, C, first, OWN=own, PART=PART, ROWS=ROWS, TURNS=C > 1,
            num_warps=4, **how,
        )  # fmt: skip
    return slot


def count(index: Tensor, into: Tensor) -> None:
    """Add to `into` (int64) how often each of its places stands in `index` (int64); what is negative is nowhere."""
    P, E = index.numel(), into.shape[0]
    if P:
        how = dict(CHUNK=COUNTED, BINS=triton.next_power_of_2(E), num_warps=4, **early(into.device))
        _count[(triton.cdiv(P, COUNTED),)](index.contiguous(), into, P, E, ADDS=True, **how)


@triton.jit(do_not_specialize=["P"])
def _look_up(
    expert, slots, replicas, counts, out, P, E, C, first,
    OWN: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_kernel_before(EARLY)
    begin = tl.program_id(0) * OWN
    p = begin + tl.arange(0, OWN)
    own = tl.load(expert + p, mask=p < P, other=0).to(tl.int32)
    at = own * C
    if TURNS:
        turn = tl.zeros([OWN], tl.int32) + first
        mine = begin // PART
        for part in range(0 if counts is None else mine, mine + 1):
            q = part * PART + tl.arange(0, PART)
            other = tl.load(expert + q, mask=q < P, other=-1).to(tl.int32)
            earlier = (own[:, None] == other[None, :]) & (q[None, :] < p[:, None])
            turn += tl.sum(earlier.to(tl.int32), axis=1)
        if counts is not None:
            for part in range(0, mine, ROWS):
                row = part + tl.arange(0, ROWS)
                number = tl.load(counts + row[None, :] * E + own[:, None], mask=row[None, :] < mine, other=0)
                turn += tl.sum(number, axis=1)
        at += turn % tl.load(replicas + own).to(tl.int32)
    tl.store(out + p, tl.load(slots + at), mask=p < P)


@triton.jit(do_not_specialize=["P"])
def _count(index, into, P, E, CHUNK: tl.constexpr, BINS: tl.constexpr, ADDS: tl.constexpr, EARLY: tl.constexpr):
    """Counts of a chunk: added to `into`, or laid down in its row of it."""
    wait_for_the_kernel_before(EARLY)
    p, e = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BINS)
    own = tl.load(index + p, mask=p < P, other=-1).to(tl.int32)
    number = tl.histogram(own, BINS, mask=own >= 0)
    if ADDS:
        tl.atomic_add(into + e, number.to(tl.int64), mask=(e < E) & (number > 0), sem="relaxed")
    else:
        tl.store(into + tl.program_id(0) * E + e, number, mask=e < E)
