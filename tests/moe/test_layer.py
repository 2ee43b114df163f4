"""The MoE layer over ranks: chunked passes are the same on every rank, change no result and bound the memory."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nonet import plugins
from nonet.comm.world import World
from nonet.eplb.placement import Placement
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes
from nonet.moe.experts import grouped, reference
from nonet.moe.layer import MoeBatch, MoeLayer, chunks
from nonet.moe.load import LoadCounter
from nonet.moe.lookup import Even
from nonet.moe.router import softmax_topk
from nonet.testing.cluster import Cluster
from nonet.testing.contracts import dense
from nonet.testing.routing import Tokens
from nonet.weights.slots import SlotWeights

D, E, K, WIDTH = 16, 8, 2, 12
MOVERS = ["all2allv", "allgather_reducescatter", "naive", "shm"]


# -- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "limit", "passes"),
    [
        ((3, 3), 4, [(3, 3)]),
        ((4, 0), 4, [(4, 0)]),
        ((5, 0, 9), 4, [(4, 0, 4), (1, 0, 4), (0, 0, 1)]),
        ((2, 1), 1, [(1, 1), (1, 0)]),
        ((0, 0), 4, []),
    ],
)
def test_chunks(rows, limit, passes):
    assert list(chunks(rows, limit)) == passes


# -- the layer ------------------------------------------------------------------------------------------------------


class Watched:
    """An all-to-all that notes how much reaches the experts at once."""

    def __init__(self, inner: All2All) -> None:
        self.inner, self.takes, self.captures = inner, inner.takes, inner.captures
        self.dispatches, self.most_rows, self.most_pairs = 0, 0, 0

    def dispatch(self, *args):
        self.dispatches += 1
        return self.inner.dispatch(*args)

    def note(self, sent: Dispatched) -> None:
        self.most_rows = max(self.most_rows, len(sent.x_ND))
        self.most_pairs = max(self.most_pairs, int(sent.count_S.sum()))

    def combine(self, y, sent):
        return self.inner.combine(y, sent)

    def close(self) -> None:
        self.inner.close()


@functools.cache
def drawn() -> tuple[SlotWeights, Tensor]:
    """All experts, and the router."""
    generator = torch.Generator().manual_seed(5)
    gate_up = torch.randn((E, 2 * WIDTH, D), generator=generator) / 4
    down = torch.randn((E, D, WIDTH), generator=generator) / 4
    return SlotWeights(gate_up.unbind(), down.unbind()), torch.randn((E, D), generator=generator)


def own_tokens(rank: int, count: int) -> Tensor:
    return torch.randn((count, D), generator=torch.Generator().manual_seed(100 + rank))


def build(world: World, name: str, max_rows: int, rule, exact: bool = False) -> tuple[MoeLayer, Watched]:
    placement = Placement.contiguous(1, E, world.size, E + world.size)  # the first experts have replicas
    spec = All2AllSpec(world.ep, placement.fleet, K, D, torch.float32, max_rows, exact)
    watched = Watched(plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec))
    kernel = reference.create() if exact else grouped.create()

    def experts(sent: Dispatched, weights: SlotWeights, takes: Takes) -> Tensor:
        watched.note(sent)
        return kernel(sent, weights, takes)

    whole, router_ED = drawn()
    held = placement.experts_on(world.rank, 0)
    layer = MoeLayer(
        index=0,
        gate=lambda x_TD: F.linear(x_TD, router_ED),
        rule=rule,
        lookup=Even(placement, 0, world.rank, world.device),
        load=LoadCounter(1, E, world.device),
        all2all=watched,
        experts=experts,
        slots=SlotWeights(tuple(whole.gate_up[e] for e in held), tuple(whole.down[e] for e in held)),
        max_rows=max_rows,
    )
    return layer, watched


def chunked(world: World, name: str, rows: tuple[int, ...], max_rows: int, exact: bool) -> tuple:
    """Dispatches, collectives, and whether chunks gave what one pass gives, and what the plain formula gives."""
    rule = softmax_topk(K, renormalise=True)
    x_TD = own_tokens(world.rank, rows[world.rank])
    layer, watched = build(world, name, max_rows, rule, exact)
    before = world.ep.calls
    y_TD = layer.forward(x_TD, MoeBatch(rows))
    calls = world.ep.calls - before
    whole, _ = build(world, name, max(rows), rule, exact)
    at_once_TD = whole.forward(x_TD, MoeBatch(rows))
    expert_TK, weight_TK = rule(layer.gate(x_TD))
    want_TD = dense(Tokens(x_TD, expert_TK, weight_TK), drawn()[0])
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    count_E = torch.bincount(expert_TK.flatten(), minlength=E)
    assert torch.equal(layer.load.count_LE[0], count_E)
    return watched.dispatches, calls, same(y_TD, at_once_TD), torch.allclose(y_TD, want_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [(20, 3, 0, 11), (0, 0, 0, 9), (8, 8, 8, 8)])
@pytest.mark.parametrize("name", MOVERS)
def test_chunks_change_nothing(cluster4: Cluster, name, rows, exact):
    outs = cluster4.run(chunked, name, rows, 8, exact)
    passes = -(-max(rows) // 8)
    assert [(dispatches, same, right) for dispatches, _, same, right in outs] == [(passes, True, True)] * 4
    assert len({calls for _, calls, _, _ in outs}) == 1


def no_tokens(world: World, name: str) -> tuple[int, int, list[int]]:
    layer, watched = build(world, name, 8, softmax_topk(K, renormalise=True))
    before = world.ep.calls
    y_TD = layer.forward(torch.empty(0, D), MoeBatch((0,) * world.size))
    return watched.dispatches, world.ep.calls - before, list(y_TD.shape)


def test_a_step_without_tokens_moves_nothing(cluster4: Cluster):
    assert cluster4.run(no_tokens, "allgather_reducescatter") == [(0, 0, [0, D])] * 4


def crowd(world: World, name: str, count: int, max_rows: int) -> tuple[int, int, int]:
    """Every token of every rank goes to two experts that only rank 2 holds."""

    def rule(logits_TE: Tensor):
        expert_TK = torch.tensor([[E - 1, E - 2]]).expand(len(logits_TE), K)
        return expert_TK, torch.full((len(logits_TE), K), 0.5)

    layer, watched = build(world, name, max_rows, rule)
    layer.forward(own_tokens(world.rank, count), MoeBatch((count,) * world.size))
    return watched.dispatches, watched.most_rows, watched.most_pairs


@pytest.mark.parametrize("name", MOVERS)
def test_all_tokens_to_one_rank_stay_within_the_chunk(cluster4: Cluster, name):
    """However many tokens: at most max_rows of each rank lie on the crowded rank at a time."""
    for count in (32, 256):
        for dispatches, rows, pairs in cluster4.run(crowd, name, count, 16):
            assert dispatches == count // 16
            assert rows <= 4 * 16
            assert pairs <= 4 * 16 * K
    _, rows, pairs = cluster4.run(crowd, name, 256, 256)[2]
    assert (rows, pairs) == (4 * 256, 4 * 256 * K)  # without chunks all of them lay there


def dummies(world: World) -> tuple[list[int], int]:
    """Tokens that are no load: they travel, and are not counted."""
    layer, watched = build(world, "all2allv", 8, softmax_topk(K, renormalise=True))
    layer.forward(own_tokens(world.rank, 4), MoeBatch((4,) * world.size, is_load=False))
    return layer.load.count_LE.flatten().tolist(), watched.dispatches


def test_dummy_tokens_are_no_load(cluster4: Cluster):
    assert cluster4.run(dummies) == [([0] * E, 1)] * 4


def shared(world: World) -> tuple[bool, list[str]]:
    """The shared expert runs between the start of sending and its end, and is added."""
    order: list[str] = []
    layer, watched = build(world, "shm", 8, softmax_topk(K, renormalise=True))
    inner = watched.inner

    class Noted(Watched):
        def dispatch(self, *args):
            order.append("dispatch")
            pending = inner.dispatch(*args)
            finish = pending._finish

            def wait():
                order.append("wait")
                return finish()

            return type(pending)(wait)

    def shared_expert(x_TD: Tensor) -> Tensor:
        order.append("shared")
        return 3 * x_TD

    x_TD = own_tokens(world.rank, 5)
    plain_TD = layer.forward(x_TD, MoeBatch((5,) * world.size))
    with_shared = replace(layer, all2all=Noted(inner), shared=shared_expert)
    y_TD = with_shared.forward(x_TD, MoeBatch((5,) * world.size))
    return torch.allclose(y_TD, plain_TD + 3 * x_TD, atol=1e-6), order


def test_the_shared_expert_runs_while_tokens_travel(cluster4: Cluster):
    assert cluster4.run(shared) == [(True, ["dispatch", "shared", "wait"])] * 4
