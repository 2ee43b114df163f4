"""Shares and whole tokens over replicas: against the exact optimum, against the engine's lookup, and as laws.

The optimum of water-filling is computed here by its definition: no split can bring the hottest rank below the load of
any set of experts over the speed of all ranks that host one of them, and some set reaches it (max-flow = min-cut).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb import dispatch
from nonet.eplb import quota as _quota
from nonet.eplb import sources as _sources
from nonet.eplb import waterfill as _waterfill
from nonet.eplb.dispatch import Replicas, WaterFill, even_shares, rank_load, waterfill
from nonet.eplb.load import imbalance
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError
from nonet.moe.lookup import Even

LAWS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw, max_experts=7, max_ranks=5):
    """(placement with one layer, load_LE) with speeds and dead ranks; every expert has a live replica."""
    experts, ranks = draw(st.integers(1, max_experts)), draw(st.integers(1, max_ranks))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    dead = frozenset(range(1, ranks)) if draw(st.booleans()) and ranks == 2 else frozenset()
    if ranks > 2 and draw(st.booleans()):
        dead = frozenset({int(rng.integers(ranks))})
    live = [rank for rank in range(ranks) if rank not in dead]
    slots_R = rng.integers(0, 4, ranks)
    slots_R[live[0]] += max(0, experts - slots_R[live].sum())
    speeds = tuple(rng.uniform(0.5, 2, ranks).tolist()) if draw(st.booleans()) else ()
    nodes = tuple(rng.integers(0, 2, ranks).tolist()) if draw(st.booleans()) else ()
    fleet = Fleet(tuple(slots_R.tolist()), nodes, speeds, dead)
    row = rng.integers(0, experts, fleet.num_slots).astype(np.int32)
    live_G = np.isin(np.repeat(np.arange(ranks), slots_R), live)
    places = rng.permutation(np.flatnonzero(live_G))[:experts]
    row[places] = rng.permutation(experts)
    load = rng.integers(0, 50, (1, experts)) * rng.integers(0, 2, (1, experts), endpoint=True)
    return Placement(row[None], fleet, experts), load.astype(np.int64)


def optimum(load_E, placement):
    """Least possible time of the slowest rank."""
    fleet, live = placement.fleet, set(placement.fleet.live_ranks)
    hosts = [set(placement.rank_of_slot()[placement.expert_LG[0] == e]) & live for e in range(len(load_E))]
    best = 0.0
    for size in range(1, len(load_E) + 1):
        for chosen in combinations(range(len(load_E)), size):
            speed = sum(fleet.speeds[rank] for rank in set().union(*(hosts[e] for e in chosen)))
            best = max(best, sum(load_E[e] for e in chosen) / speed)
    return best


def connected(num_layers, num_experts, num_ranks, seed=0):
    """Experts in order and, on each rank, one copy of the first expert of the next: a ring."""
    own = num_experts // num_ranks
    rows = np.arange(num_experts).reshape(num_ranks, own)
    row = np.concatenate([rows, np.roll(rows[:, :1], -1, axis=0)], axis=1).reshape(-1)
    fleet = Fleet.even(num_ranks, num_experts + num_ranks)
    return Placement(np.tile(row, (num_layers, 1)).astype(np.int32), fleet, num_experts)


# -- shares -----------------------------------------------------------------------------------------------------------


def test_even_shares_by_hand():
    """Expert 0 lives on ranks 0 and 2 and on dead rank 1."""
    fleet = Fleet((2, 1, 1), dead_ranks=frozenset({1}))
    placement = Placement(np.array([[0, 1, 0, 0]], dtype=np.int32), fleet, 2)
    assert even_shares(placement).tolist() == [[0.5, 1.0, 0.0, 0.5]]
    assert even_shares(placement, 0).tolist() == [0.5, 1.0, 0.0, 0.5]
    load_LR = rank_load(np.array([[10, 4]]), placement)
    assert load_LR.tolist() == [[9.0, 0.0, 5.0]]
    assert imbalance(load_LR, fleet).tolist() == pytest.approx([2 / 7])  # the dead rank is no part of the mean


def test_waterfill_by_hand():
    """Ranks hold 30 and 10 of their own, and expert 2's 40 tokens fill both up to 40."""
    placement = Placement(np.array([[0, 2, 1, 2]], dtype=np.int32), Fleet.even(2, 4), 3)
    share_LG = waterfill(np.array([[30, 10, 40]]), placement)
    np.testing.assert_allclose(share_LG, [[1, 0.25, 1, 0.75]])
    np.testing.assert_allclose(waterfill(np.array([[90, 10, 40]]), placement), [[1, 0, 1, 1]], atol=1e-12)


def test_a_faster_rank_gets_more():
    fleet = Fleet((1, 1), speed_of_rank=(3.0, 1.0))
    placement = Placement(np.array([[0, 0]], dtype=np.int32), fleet, 1)
    share_LG = waterfill(np.array([[80]]), placement)
    np.testing.assert_allclose(share_LG, [[0.75, 0.25]])
    np.testing.assert_allclose(imbalance(rank_load(np.array([[80]]), placement, share_LG), fleet), [0], atol=1e-12)


@LAWS
@given(case=cases())
def test_run_to_the_end_it_is_the_optimum(case):
    placement, load = case
    fill = WaterFill(placement)
    share_LG = fill.solve(load, sweeps=None)
    time_R = rank_load(load, placement, share_LG)[0] / np.array(placement.fleet.speeds)
    assert time_R.max() == pytest.approx(optimum(load[0], placement), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(fill.load_LR, rank_load(load, placement, share_LG), atol=1e-9)
    sums_E = np.bincount(placement.expert_LG[0], weights=share_LG[0], minlength=placement.num_experts)
    np.testing.assert_allclose(sums_E, 1, atol=1e-9)
    assert share_LG.min() >= 0
    assert (share_LG[0][np.isin(placement.rank_of_slot(), sorted(placement.fleet.dead_ranks))] == 0).all()


@pytest.mark.parametrize("ranks", [8, 64])
def test_a_ring_is_levelled_in_eight_sweeps(ranks):
    """The slowest case for sweeps alone: load has to travel around a ring of ranks."""
    placement = connected(1, 4 * ranks, ranks)
    load = np.full((1, 4 * ranks), 100.0)
    load[0, 1 : 2 * ranks : 4] += np.linspace(6, 0, ranks // 2)  # one half of the ring is hotter, most at one end
    assert imbalance(rank_load(load, placement)).max() > 0.01
    few = imbalance(rank_load(load, placement, waterfill(load, placement)))
    exact = imbalance(rank_load(load, placement, waterfill(load, placement, sweeps=None)))
    assert exact.max() < 1e-6
    assert few.max() < 1e-3


def test_a_warm_start_goes_on_where_the_last_one_ended():
    placement = connected(2, 32, 8)
    load = np.random.default_rng(0).uniform(50, 150, (2, 32))
    fill = WaterFill(placement)
    done = fill.solve(load, sweeps=None)
    np.testing.assert_allclose(fill.solve(load, sweeps=1), done, atol=1e-6)
    np.testing.assert_allclose(waterfill(load, placement, share_LG=done, sweeps=0), done, atol=1e-12)
    shares = fill.solve(np.zeros((2, 32)))  # no tokens: what was known stays
    np.testing.assert_allclose(shares, done, atol=1e-6)


def test_components():
    assert Replicas.of(connected(2, 16, 4)).components().tolist() == [1, 1]
    assert Replicas.of(Placement.contiguous(1, 16, 4)).components().tolist() == [4]
    part = Placement(np.array([[0, 1, 0, 2, 3, 3]], dtype=np.int32), Fleet.even(3, 6), 4)
    assert Replicas.of(part).components().tolist() == [2]  # expert 3's replicas are on one rank and join nothing


def test_what_is_compiled_before_ranks_start_is_all_they_need():
    """No kernel gets a second form later on, neither from arrays of other origins nor from other options."""
    dispatch.precompile()
    loops = [_waterfill.solve, _quota._slot_tokens, _quota._quotas, _sources._slot_sums]
    before = [len(loop.signatures) for loop in loops]
    placement = connected(2, 16, 4)
    fill = WaterFill(placement)
    count_RE = torch.ones((4, 16), dtype=torch.int64).numpy()
    total = count_RE.sum(axis=0, keepdims=True).repeat(2, axis=0)
    tokens_LG = dispatch.slot_tokens(total, fill.solve(total, sweeps=None), fill.replicas)
    dispatch.quotas(count_RE.astype(np.int32), tokens_LG[1], fill.replicas, 1, rank=2)
    dispatch.own_quota(count_RE[1], fill.share_LG[1], fill.replicas, 1, 3)
    dispatch.even_quota(count_RE[1], fill.replicas, 1, 3)
    assert [len(loop.signatures) for loop in loops] == before == [1, 1, 1, 1]


def test_a_lost_expert_is_refused():
    fleet = Fleet((1, 1), dead_ranks=frozenset({1}))
    with pytest.raises(ConfigError, match="layer 0: no replica of it is on a live rank; plan again"):
        WaterFill(Placement(np.array([[0, 1]], dtype=np.int32), fleet, 2))


def test_a_load_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"must be \[layers, experts\] = \(1, 16\)"):
        waterfill(np.ones((1, 15)), Placement.contiguous(1, 16, 4))


# -- whole tokens -----------------------------------------------------------------------------------------------------


@LAWS
@given(case=cases(), seed=st.integers(0, 1000))
def test_whole_tokens_keep_their_sums(case, seed):
    """By slot within 1 of the share; by source and slot exact in both sums; and each pair finds its slot."""
    placement, load = case
    replicas = Replicas.of(placement)
    rng = np.random.default_rng(seed)
    ranks = placement.fleet.num_ranks
    count_RE = rng.multinomial(load[0], np.full(ranks, 1 / ranks)).T.astype(np.int64)
    share_LG = waterfill(load, placement)
    tokens_LG = dispatch.slot_tokens(load, share_LG, replicas)
    row = placement.expert_LG[0]
    assert (np.abs(tokens_LG[0] - load[0, row] * share_LG[0]) < 1 + 1e-6).all()
    assert (np.bincount(row, weights=tokens_LG[0], minlength=len(load[0])) == load[0]).all()
    quota_RG = dispatch.quotas(count_RE, tokens_LG[0], replicas, 0)
    assert quota_RG.min() >= 0
    assert (quota_RG.sum(axis=0) == tokens_LG[0]).all()
    for rank in range(ranks):
        assert (dispatch.quotas(count_RE, tokens_LG[0], replicas, 0, rank) == quota_RG[rank]).all()
        assert (np.bincount(row, weights=quota_RG[rank], minlength=len(load[0])) == count_RE[rank]).all()
        pairs = rng.permutation(np.repeat(np.arange(len(load[0])), count_RE[rank]))
        expert_TK = np.append(pairs, [-1])[:, None]  # with a padded pair
        slot_TK = dispatch.assign(expert_TK, quota_RG[rank], replicas, 0)
        assert slot_TK[-1] == -1
        assert (row[slot_TK[:-1, 0]] == pairs).all()
        assert (np.bincount(slot_TK[:-1, 0], minlength=len(row)) == quota_RG[rank]).all()


def test_ranks_stay_near_their_share():
    """Rounding 64 experts on each of 8 ranks does not add up: every rank ends within 1.5 tokens of its share."""
    placement = connected(4, 64, 8)
    load = np.random.default_rng(1).integers(90, 110, (4, 64))
    fill = WaterFill(placement)
    share_LG = fill.solve(load, sweeps=None)
    tokens_LG = dispatch.slot_tokens(load, share_LG, fill.replicas)
    for layer in range(4):
        load_R = np.bincount(placement.rank_of_slot(), weights=tokens_LG[layer])
        assert np.abs(load_R - fill.load_LR[layer]).max() < 1.5


def test_own_slot_first_then_own_node():
    """Expert 0 on ranks 0, 2, 4 of two nodes (0-2, 3-5), 20 tokens each; ten tokens from each of six ranks."""
    fleet = Fleet((1,) * 6, node_of_rank=(0, 0, 0, 1, 1, 1))
    placement = Placement(np.array([[0, 1, 0, 2, 0, 3]], dtype=np.int32), fleet, 4)
    count_RE = np.zeros((6, 4), np.int64)
    count_RE[:, 0] = 10
    quota_RG = dispatch.quotas(count_RE, np.array([20, 0, 20, 0, 20, 0]), Replicas.of(placement), 0)
    assert quota_RG[:, [0, 2, 4]].tolist() == [[10, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 10], [0, 0, 10], [0, 10, 0]]


def test_passes_over_parts_of_a_batch_are_balanced_too():
    placement = Placement(np.array([[0, 0, 0]], dtype=np.int32), Fleet.even(3, 3), 1)
    slot_T = dispatch.assign(np.zeros(1000, np.int64), np.array([500, 300, 200]), Replicas.of(placement), 0)
    for part in np.split(slot_T, 10):
        assert np.abs(np.bincount(part, minlength=3) - [50, 30, 20]).max() <= 5


@LAWS
@given(case=cases(), rank=st.integers(0, 40), seed=st.integers(0, 1000))
def test_a_rank_by_itself_keeps_to_the_shares(case, rank, seed):
    placement, load = case
    replicas = Replicas.of(placement)
    share_LG = waterfill(load, placement)
    count_E = np.random.default_rng(seed).integers(0, 30, placement.num_experts)
    quota_G = dispatch.own_quota(count_E, share_LG[0], replicas, 0, rank)
    row = placement.expert_LG[0]
    assert (np.abs(quota_G - count_E[row] * share_LG[0]) < 1 + 1e-6).all()
    assert (np.bincount(row, weights=quota_G, minlength=len(count_E)) == count_E).all()


def test_ranks_with_equal_counts_do_not_favour_the_same_slot():
    """One token for an expert on each of 100 ranks, shares 0.7 and 0.3: 70 and 30 go where they should."""
    placement = Placement(np.array([[0, 0]], dtype=np.int32), Fleet.even(2, 2), 1)
    replicas = Replicas.of(placement)
    total = sum(dispatch.own_quota([1], np.array([0.7, 0.3]), replicas, 0, rank) for rank in range(100))
    assert abs(total[0] - 70) <= 1


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_even_quotas_are_what_the_engine_does(rank):
    placement = Placement(np.array([[0, 1, 0, 2, 0, 1, 3]], dtype=np.int32), Fleet.even(4, 7), 4)
    expert_TK = torch.from_numpy(np.random.default_rng(rank).integers(0, 4, (33, 2)))
    slot_TK = Even(placement, 0, rank, torch.device("cpu")).reference(expert_TK)
    count_E = np.bincount(expert_TK.numpy().reshape(-1), minlength=4)
    quota_G = dispatch.even_quota(count_E, Replicas.of(placement), 0, rank)
    assert quota_G.tolist() == np.bincount(slot_TK.numpy().reshape(-1), minlength=7).tolist()
