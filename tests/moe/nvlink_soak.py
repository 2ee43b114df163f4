"""What test_nvlink runs on every rank: passes without a word from the host, and waiting for one that stays away.

Graphs of some passes each are replayed in random order. All that a pass does comes from a counter on the device:
routing, weights and values, and how long a rank dawdles. Experts are numbers that their slots stand for, and all are
so small that sums are exact: any difference is a mistake. Legend: see nonet/moe/base.py.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from nonet import plugins
from nonet.comm.world import World
from nonet.config.fleet import Fleet
from nonet.errors import CommTimeout
from nonet.moe.base import All2All, All2AllSpec, Dispatched

K, D, SLOTS, MOST = 8, 256, 12, 96
ROWS = [(32, 32), (0, 17), (5, 0), (MOST, 1), (0, 0), (1, MOST), (64, 64), (3, 8)]
A_GRAPH = 25
LONGEST_NS = 30_000


@triton.jit
def _dawdle(nanoseconds):
    until = globaltimer() + tl.load(nanoseconds)
    while globaltimer() < until:
        pass


class Passes:
    """A rank's passes with so many rows, and what came out wrong."""

    def __init__(self, world: World, name: str, faulty: bool) -> None:
        self.rank, self.device, self.faulty = world.rank, world.device, faulty
        fleet = Fleet.even(world.size, SLOTS * world.size)
        spec = All2AllSpec(world.ep, fleet, K, D, torch.bfloat16, MOST, exact=False)
        self.first, self.num_slots = spec.first_slot, fleet.num_slots
        self.backend: All2All = plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec)
        self.number = torch.zeros((), dtype=torch.int64, device=world.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=world.device)

    def one(self, rows: tuple[int, ...]) -> None:
        self.number += 1
        x_TD, slot_TK, weight_TK = self.tokens(rows[self.rank])
        self.dawdle(3)
        sent = self.backend.dispatch(x_TD, slot_TK, weight_TK, rows).wait()
        self.backend.poison()
        y_ND = self.experts(sent)
        if self.faulty:
            y_ND[:, 5] += 1
        sent.x_ND.fill_(torch.nan)
        self.dawdle(5)
        got_TD = self.backend.combine(y_ND, sent).wait()
        weight_TK = torch.where(slot_TK < 0, 0, weight_TK * self.meaning(slot_TK))
        want_TD = x_TD.float() * weight_TK.sum(dim=1, keepdim=True)
        self.wrong += (got_TD.float() != want_TD).any()

    def hashed(self, *shape: int, salt: int) -> Tensor:
        """Numbers from 0 to 2^20, by this pass and rank."""
        size = torch.Size(shape).numel()
        at = torch.arange(size, device=self.device) + self.number * 7919 + self.rank * 104_729 + salt * 1_299_709
        mixed = (at * 2_654_435_761) % (1 << 32)
        mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) % (1 << 32)
        return ((mixed ^ (mixed >> 13)) >> 12).view(shape)

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = (self.hashed(count, D, salt=1) % 7 - 3).bfloat16()
        slot_TK = self.hashed(count, K, salt=2) % (self.num_slots + 3)
        hot_TK = slot_TK % 3  # some passes send all to a few slots
        slot_TK = torch.where(self.number % 4 == 0, hot_TK, slot_TK)
        slot_TK = torch.where(slot_TK >= self.num_slots, -1, slot_TK)  # stays at home
        return x_TD, slot_TK, (self.hashed(count, K, salt=3) % 3).float()

    def meaning(self, slot: Tensor) -> Tensor:
        return slot % 3 - 1.0

    def experts(self, sent: Dispatched) -> Tensor:
        """[N, D], in the window: each row times the sum of its weights and slots' numbers on this rank."""
        end_S = sent.start_S + sent.count_S
        pair_M = torch.arange(len(sent.row_M), device=self.device)
        slot_M = torch.bucketize(pair_M, end_S, right=True).clamp(max=SLOTS - 1) + self.first
        factor_M = (self.meaning(slot_M) * sent.weight_M).nan_to_num()
        factor_NK = torch.where(sent.pair_NK >= 0, factor_M[sent.pair_NK.clamp(min=0)], 0)
        here_N = (sent.pair_NK >= 0).any(dim=1, keepdim=True)
        y_ND = torch.where(here_N, sent.x_ND.float(), 0) * factor_NK.sum(dim=1, keepdim=True)
        assert sent.out is not None
        return sent.out.copy_(y_ND)

    def dawdle(self, salt: int) -> None:
        """Not at all, mostly."""
        for_ns = self.hashed(1, salt=salt)
        _dawdle[(1,)](torch.where(for_ns % 4 == 0, for_ns % LONGEST_NS, 0), num_warps=1)


def soak(world: World, name: str, passes: int, faulty: bool = False) -> dict[str, int]:
    """Passes done, and wrong ones on this rank."""
    work = Passes(world, name, faulty)
    graphs = []
    for rows in ROWS:
        work.one(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(A_GRAPH):
                work.one(rows)
        graphs.append(graph)
    work.number.zero_()
    work.wrong.zero_()
    same = random.Random(1)  # of all ranks
    for done in range(0, passes, A_GRAPH):
        same.choice(graphs).replay()
        if done % 5000 == 0:
            torch.cuda.synchronize()
            work.backend.check()
    torch.cuda.synchronize()
    work.backend.check()
    return {"passes": int(work.number), "wrong": int(work.wrong)}


def one_stays_away(world: World, name: str, returns_after_s: float | None = None) -> tuple[str, float]:
    """All but the last rank dispatch and combine: what `check` says, and how long the wait after the first took.

    The last rank stays away, or comes too late; then it must learn of it, too.
    """
    fleet = Fleet.even(world.size, 2 * world.size)
    spec = All2AllSpec(world.ep, fleet, 2, 32, torch.float32, 4, exact=False)
    backend = plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec)
    if world.rank == world.size - 1:
        if returns_after_s is None:
            return "", 0.0
        time.sleep(returns_after_s)
    x_TD, weight_TK = torch.ones((4, 32), device=world.device), torch.ones((4, 2), device=world.device)
    slot_TK = torch.zeros((4, 2), dtype=torch.int64, device=world.device)
    backend.check()  # nothing yet
    sent = backend.dispatch(x_TD, slot_TK, weight_TK, [4] * world.size).wait()
    assert sent.out is not None
    sent.count_S.tolist()
    began = time.monotonic()
    backend.combine(sent.out, sent).wait().tolist()
    took = time.monotonic() - began
    with pytest.raises(CommTimeout) as caught:
        backend.check()
    return str(caught.value), took
