"""The contract suite itself: backends broken on purpose must not pass it, each for its own reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nonet.comm.group import Pending
from nonet.comm.world import World
from nonet.moe.all2all.allgather_reducescatter import AllGatherReduceScatter
from nonet.moe.base import Dispatched
from nonet.testing.cluster import Cluster
from nonet.testing.contracts import Case, check_all2all

EVEN = Case(((8, 8),), top_k=3)


class Sound(AllGatherReduceScatter):
    pass


class LosesAPair(AllGatherReduceScatter):
    def dispatch(self, *args: Any) -> Pending[Dispatched]:
        sent = super().dispatch(*args).wait()
        count_S = sent.count_S.clone()
        count_S[-1] -= 1
        return Pending(lambda: replace(sent, count_S=count_S))


class SendsTwice(AllGatherReduceScatter):
    """Every pair reads a copy of its row that stands behind all rows."""

    def dispatch(self, *args: Any) -> Pending[Dispatched]:
        sent = super().dispatch(*args).wait()
        row_M, N = sent.row_M.clone(), len(sent.x_ND)
        row_M[::2] += N
        return Pending(lambda: replace(sent, x_ND=torch.cat([sent.x_ND, sent.x_ND]), row_M=row_M))


class MixesRows(AllGatherReduceScatter):
    """The number of rows is right, but they belong to others."""

    def dispatch(self, *args: Any) -> Pending[Dispatched]:
        sent = super().dispatch(*args).wait()
        return Pending(lambda: replace(sent, x_ND=sent.x_ND.roll(1, dims=0)))


class ForgetsARank(AllGatherReduceScatter):
    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        return super().combine(y * (self.spec.group.rank != 1), sent)


class ReadsUndefinedRows(AllGatherReduceScatter):
    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        return super().combine(y + 0 * sent.x_ND.sum(), sent)


class ReadsUndefinedWeights(AllGatherReduceScatter):
    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        return super().combine(y + 0 * sent.weight_M.sum(), sent)


class ReturnsPadding(AllGatherReduceScatter):
    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        summing = super().combine(y, sent)
        idle_T = (sent.ticket.slot_TK < 0).all(dim=1, keepdim=True)  # type: ignore[attr-defined]
        return Pending(lambda: summing.wait() + idle_T * 1e-7)


class ReturnsFloat(AllGatherReduceScatter):
    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        summing = super().combine(y, sent)
        return Pending(lambda: summing.wait().double())


class SumsBackwards(AllGatherReduceScatter):
    """Right to the last digits but not in them."""

    def combine(self, y: torch.Tensor, sent: Dispatched) -> Pending[torch.Tensor]:
        ticket = sent.ticket
        turned = replace(ticket, weight_TK=ticket.weight_TK.flip(1), slot_TK=ticket.slot_TK.flip(1))  # type: ignore
        return super().combine(y, replace(sent, pair_NK=sent.pair_NK.flip(1), ticket=turned))


class CallsMoreOnOneRank(AllGatherReduceScatter):
    def close(self) -> None:
        self.spec.group.calls += self.spec.group.rank


BROKEN = {
    "LosesAPair": (EVEN, "pairs by slot"),
    "SendsTwice": (EVEN, "rows are read, expected"),
    "MixesRows": (EVEN, "off by"),
    "ForgetsARank": (EVEN, "off by"),
    "ReadsUndefinedRows": (replace(EVEN, top_k=1, num_experts=16), "off by nan"),
    "ReadsUndefinedWeights": (EVEN, "off by nan"),
    "ReturnsPadding": (replace(EVEN, routing="dropped"), "padding did not give zero"),
    "ReturnsFloat": (EVEN, "float64"),
    "SumsBackwards": (replace(EVEN, exact=True), "not the same bits"),
}


def verdict(world: World, name: str, case: Case) -> tuple[str, int]:
    """What the suite says of a backend of this file on this rank."""
    backend = globals()[name]
    sys.modules[f"broken.{name}"] = SimpleNamespace(create=backend)  # type: ignore[assignment]
    try:
        return "sound", check_all2all(world, f"broken.{name}", case).calls
    except AssertionError as error:
        return str(error), 0


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backend_does_not_pass(cluster2: Cluster, name: str):
    case, reason = BROKEN[name]
    for said, _ in cluster2.run(verdict, name, case):
        assert reason in said


@pytest.mark.parametrize("case", [EVEN, replace(EVEN, exact=True), replace(EVEN, routing="dropped")])
def test_the_same_backend_unbroken_passes(cluster2: Cluster, case: Case):
    assert [said for said, _ in cluster2.run(verdict, "Sound", case)] == ["sound"] * 2


def test_unequal_numbers_of_collectives_show(cluster2: Cluster):
    calls = [calls for _, calls in cluster2.run(verdict, "CallsMoreOnOneRank", EVEN)]
    assert calls[1] == calls[0] + 1
