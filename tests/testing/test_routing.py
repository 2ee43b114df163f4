"""Made-up tokens: the same on every rank that rebuilds them, and of the kind their name says."""

from __future__ import annotations

import pytest
import torch

from nonet.comm.world import World
from nonet.testing.cluster import Cluster
from nonet.testing.routing import KINDS, Imbalanced, Tokens, tokens

E, K, HOME = 16, 4, (4, 5, 6, 7)


def made(kind, rank: int = 0, count: int = 600, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tokens:
    return tokens(kind, seed, rank, count, hidden_size=8, num_experts=E, top_k=K, home=HOME, dtype=dtype)


def different(expert_TK: torch.Tensor) -> bool:
    return all(len(set(row)) == K for row in expert_TK.tolist())


def of_all_ranks(world: World, kind: str) -> list[list[list]]:
    return [made(kind, rank, 20).expert_TK.tolist() for rank in range(world.size)]


def test_every_rank_rebuilds_every_other(cluster4: Cluster):
    first, *others = cluster4.run(of_all_ranks, "mixed")
    assert all(other == first for other in others)
    assert len({str(experts) for experts in first}) == 4  # ranks have different tokens


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_weights(kind):
    given = made(kind, dtype=torch.bfloat16)
    assert given.x_TD.dtype == torch.bfloat16
    assert given.expert_TK.dtype == torch.int64
    assert given.weight_TK.dtype == torch.float32
    travels_TK = given.expert_TK >= 0
    assert given.expert_TK.max() < E
    assert torch.equal(given.weight_TK.isnan(), ~travels_TK)
    assert torch.equal(given.x_TD.isnan().all(dim=1), ~travels_TK.any(dim=1))
    assert made(kind, count=0).expert_TK.shape == (0, K)


def test_uniform():
    expert_TK = made("uniform").expert_TK
    assert different(expert_TK)
    assert torch.bincount(expert_TK.flatten(), minlength=E).min() > 100  # of 150 expected


def test_hot_expert():
    expert_TK = made("hot_expert").expert_TK
    assert different(expert_TK)
    assert (expert_TK == HOME[0]).any(dim=1).all()
    assert (expert_TK == HOME[0]).any(dim=0).all()  # at any of the K places


def test_one_rank():
    assert set(made("one_rank").expert_TK.flatten().tolist()) == set(HOME)
    few = tokens("one_rank", 1, 0, 50, hidden_size=8, num_experts=E, top_k=K, home=(3,))
    assert set(few.expert_TK.flatten().tolist()) == {3}


def test_repeated():
    expert_TK = made("repeated").expert_TK
    assert (expert_TK[::3] == expert_TK[::3, :1]).all()
    assert not different(expert_TK)


def test_dropped():
    expert_TK = made("dropped").expert_TK
    assert (expert_TK[::4] == -1).all()
    others = expert_TK[torch.arange(600) % 4 != 0]
    assert 0.28 < (others == -1).float().mean() < 0.39


def test_skewed():
    count_E = torch.bincount(made("skewed").expert_TK.flatten(), minlength=E)
    assert count_E[0] > 1.5 * count_E[2] > 3 * count_E[15]


@pytest.mark.parametrize(("ratio", "num_ranks"), [(0.5, 4), (1.0, 4), (0.8, 2)])
def test_imbalanced(ratio, num_ranks):
    expert_TK = made(Imbalanced(ratio, num_ranks)).expert_TK
    load_R = torch.bincount(expert_TK.flatten() // (E // num_ranks), minlength=num_ranks).float()
    assert abs(load_R[0] / load_R.mean() - 1 - ratio) < 0.03


def test_mixed_is_of_several_kinds():
    seen = {str(made("mixed", rank=rank, count=3).expert_TK.tolist()) for rank in range(30)}
    dropped = sum("-1" in text for text in seen)
    assert len(seen) == 30
    assert 1 <= dropped < 15
