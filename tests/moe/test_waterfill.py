"""Lookups that follow the load: every slot gets exactly its quota, all ranks agree, and hot ranks are relieved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb.dispatch import Replicas, WaterFill, assign, own_quota, quotas, slot_tokens
from nonet.eplb.load import imbalance
from nonet.eplb.placement import Placement
from nonet.moe.lookup import Even
from nonet.moe.waterfill import ByAverageLookups, ByStep, ByStepLookups, spread, spread_reference
from nonet.testing.cluster import Cluster

CPU = torch.device("cpu")
# two experts that take most, each on two ranks: A on 0 and 1, B on 1 and 2; rank 3 holds cold ones only
RING = Placement(np.array([[0, 2, 3, 0, 1, 4, 1, 5, 6, 7, 8, 0]], dtype=np.int32), Fleet.even(4, 12), 9)


def chosen(placement: Placement, rows: int, top_k: int, seed: int, skew: float = 1.0) -> torch.Tensor:
    """Experts [rows, top_k] of one rank, the first the most wanted."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, placement.num_experts + 1) ** -skew
    return torch.from_numpy(rng.choice(placement.num_experts, size=(rows, top_k), p=share / share.sum()))


def step(placement: Placement, expert_RTK: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every rank's lookup says if all take part in one step."""
    count_RE = torch.stack([torch.bincount(e.reshape(-1), minlength=placement.num_experts) for e in expert_RTK])
    seen: list[torch.Tensor] = []

    def gather(own_E: torch.Tensor) -> torch.Tensor:
        seen.append(own_E)
        return count_RE

    out = [ByStep(placement, rank, gather)(expert_TK) for rank, expert_TK in enumerate(expert_RTK)]
    assert torch.equal(torch.stack(seen), count_RE)  # each rank tells its own
    return out


def rank_tokens(placement: Placement, slots: list[torch.Tensor]) -> np.ndarray:
    count_G = torch.bincount(torch.cat([s.reshape(-1) for s in slots]), minlength=placement.fleet.num_slots).numpy()
    return np.bincount(placement.rank_of_slot(), count_G, placement.fleet.num_ranks)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), num_experts=st.integers(1, 12), extra=st.integers(0, 9), ranks=st.integers(1, 5),
    rows=st.integers(0, 40), top_k=st.integers(1, 4),
)  # fmt: skip
def test_all_ranks_of_a_step_together(seed, num_experts, extra, ranks, rows, top_k):
    """Slots hold the experts asked for, and get what `slot_tokens` says of the water-filled shares."""
    rng = np.random.default_rng(seed)
    slots = max(num_experts + extra, ranks)
    row = rng.permutation([*range(num_experts), *rng.integers(num_experts, size=slots - num_experts)])
    placement = Placement(row[None].astype(np.int32), Fleet.even(ranks, slots), num_experts)
    expert_RTK = [chosen(placement, max(0, rows - 7 * r), top_k, seed + r) for r in range(ranks)]
    slot_RTK = step(placement, expert_RTK)
    for expert_TK, slot_TK in zip(expert_RTK, slot_RTK, strict=True):
        assert slot_TK.dtype == torch.int64
        assert torch.equal(torch.from_numpy(row)[slot_TK], expert_TK)
    total_1E = np.bincount(torch.cat([e.reshape(-1) for e in expert_RTK]), minlength=num_experts)[None]
    fill = WaterFill(placement)
    want_G = slot_tokens(total_1E, fill.solve(total_1E), fill.replicas)[0]
    assert np.bincount(torch.cat([s.reshape(-1) for s in slot_RTK]), minlength=slots).tolist() == want_G.tolist()


def test_hot_ranks_are_relieved():
    expert_RTK = [chosen(RING, 256, 2, seed, skew=0.9) for seed in range(4)]
    even = [Even(RING, 0, rank, CPU)(expert_TK) for rank, expert_TK in enumerate(expert_RTK)]
    before, after = (imbalance(rank_tokens(RING, slots)[None])[0] for slots in (even, step(RING, expert_RTK)))
    assert before > 0.2
    assert after < 0.01


def test_a_rank_prefers_its_own_replica():
    """Rank 0 holds expert 0 itself, and its part of it is large enough for all of rank 0's tokens."""
    expert_RTK = [torch.zeros((8, 1), dtype=torch.int64) for _ in range(4)]
    slot_RTK = step(RING, expert_RTK)
    assert set(slot_RTK[0].flatten().tolist()) == {0}


def test_spreading_is_as_specified():
    replicas = Replicas.of(RING)
    for seed in range(20):
        expert_TK = chosen(RING, 40, 3, seed)
        count_E = torch.bincount(expert_TK.reshape(-1), minlength=9).numpy()
        quota_G = own_quota(count_E, WaterFill(RING).solve(count_E[None])[0], replicas, 0, seed % 4)
        want_TK = assign(expert_TK.numpy(), quota_G, replicas, 0)
        assert np.array_equal(spread(expert_TK, quota_G, replicas).numpy(), want_TK)
        plain_TK = spread_reference(expert_TK, quota_G, replicas.order_LG[0], replicas.count_LE[0])
        assert np.array_equal(plain_TK.numpy(), want_TK)


def test_parts_of_a_batch_are_balanced_too():
    """Passes over parts of a batch see the split that the whole has, within two tokens."""
    replicas = Replicas.of(RING)
    expert_TK = torch.zeros((90, 1), dtype=torch.int64)
    quota_G = np.zeros(12, np.int64)
    quota_G[[0, 3, 11]] = 45, 30, 15
    slot_TK = spread(expert_TK, quota_G, replicas)
    for part in slot_TK.split(30):
        count = torch.bincount(part.flatten(), minlength=12)[[0, 3, 11]]
        assert (count - torch.tensor([15, 10, 5])).abs().max() <= 2


def test_an_average_follows_the_load():
    """Even at first; after learning that expert 0 is hot, its replica on the rank of other hot experts gets less."""
    lookups = ByAverageLookups(RING, rank=1)
    assert lookups.learns
    lookup, expert_TK = lookups.of(0), torch.zeros((99, 1), dtype=torch.int64)
    assert torch.bincount(lookup(expert_TK).flatten(), minlength=12)[[0, 3, 11]].tolist() == [33, 33, 33]
    load_LE = np.array([[300, 290, 5, 5, 5, 5, 5, 5, 5]])
    for _ in range(3):
        lookups.learn(load_LE)
    count = torch.bincount(lookup(expert_TK).flatten(), minlength=12)[[0, 3, 11]].tolist()
    fill = WaterFill(RING)
    wanted = fill.solve(load_LE)[0][[0, 3, 11]] * 99
    assert np.abs(count - wanted).max() <= 1
    assert count[1] < 20  # rank 1 holds expert 1 too


def test_no_tokens():
    none = torch.empty((0, 2), dtype=torch.int64)
    assert ByAverageLookups(RING, 0).of(0)(none).shape == (0, 2)
    assert [s.shape for s in step(RING, [none] * 4)] == [(0, 2)] * 4


def gathered(world, name: str) -> list:
    """Several exchanges in a row without a dispatch between, ranks out of step; everyone's counts by everyone."""
    from nonet import plugins
    from nonet.moe.base import All2AllSpec

    spec = All2AllSpec(world.ep, Fleet.even(world.size, 3 * world.size), 2, 8, torch.float32, 4, exact=False)
    backend = plugins.load("nonet.moe.all2all", name, "all2all_backend").create(spec)
    lookups = ByStepLookups(Placement.contiguous(2, 2 * world.size, world.size, 3 * world.size), 0, lambda x: x)
    assert not lookups.learns
    out = []
    for turn in range(40):
        own_E = torch.arange(2 * world.size) * (world.rank + 1) + turn
        if (turn + world.rank) % 7 == 0:
            torch.ones(200, 200).mm(torch.ones(200, 200))
        out.append(backend.gather_counts(own_E).tolist())
    backend.close()
    return out


@pytest.mark.parametrize("name", ["shm", "naive", "allgather_reducescatter", "all2allv", "tensor"])
def test_ranks_tell_each_other_their_counts(cluster4: Cluster, name: str):
    want = [[(np.arange(8) * (r + 1) + turn).tolist() for r in range(4)] for turn in range(40)]
    assert cluster4.run(gathered, name) == [want] * 4


def test_one_rank_alone_has_its_own_counts(cluster4: Cluster):
    assert [one[0] for one in cluster4.run(gathered_alone)] == [[[r, r]] for r in range(4)]


def gathered_alone(world) -> list:
    from nonet.comm.group import Group
    from nonet.moe.all2all import local
    from nonet.moe.base import All2AllSpec

    alone = Group([world.rank], world.rank, 5.0, world.device)
    backend = local.create(All2AllSpec(alone, Fleet.even(1, 2), 1, 8, torch.float32, 4, exact=False))
    return [backend.gather_counts(torch.full((2,), world.rank)).tolist()]


@pytest.mark.gpus(1)
def test_spreading_on_a_gpu_is_the_same():
    replicas = Replicas.of(RING)
    expert_TK = chosen(RING, 200, 4, seed=3)
    count_E = torch.bincount(expert_TK.reshape(-1), minlength=9).numpy()
    tokens_G = slot_tokens(count_E[None], WaterFill(RING).solve(count_E[None]), replicas)[0]
    quota_G = quotas(np.stack([count_E, *np.zeros((3, 9), np.int64)]), tokens_G, replicas, 0)[0]
    assert torch.equal(spread(expert_TK.cuda(), quota_G, replicas).cpu(), spread(expert_TK, quota_G, replicas))
