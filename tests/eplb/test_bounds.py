"""Bounds are below everything that exists, and the best split is the best there is: against brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb.bounds import lower_bound, predicted
from nonet.eplb.load import imbalance, rank_load
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError


def subsets(items):
    return (set(chosen) for size in range(1, len(items) + 1) for chosen in combinations(items, size))


def least_by_cuts(load, row, fleet) -> float:
    """By the min-cut theorem: the load of some experts has nowhere to go but the live ranks that hold any of them."""
    ranks = Placement(np.array([row]), fleet, len(load)).rank_of_slot()
    hosts = {e: {int(r) for r, held in zip(ranks, row, strict=True) if held == e} for e in range(len(load))}
    worst = 0.0
    for chosen in subsets(range(len(load))):
        among = set().union(*(hosts[e] for e in chosen)) - fleet.dead_ranks
        worst = max(worst, sum(load[e] for e in chosen) / sum(fleet.speeds[r] for r in among))
    perfect = sum(load) / sum(fleet.speeds[r] for r in fleet.live_ranks)
    return worst / perfect - 1 if perfect else 0.0


@st.composite
def small(draw):
    """A load of up to 4 experts and a fleet of up to 4 ranks whose placements can all be tried."""
    experts = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(lambda n: experts <= sum(n) <= 6))
    dead = frozenset(draw(st.sets(st.integers(0, len(sizes) - 1), max_size=1)))
    if sum(n for rank, n in enumerate(sizes) if rank not in dead) < experts:
        dead = frozenset()
    speeds = draw(st.sampled_from([(), tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in sizes)]))
    load = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 7.0, 20.0, 50.5]), min_size=experts, max_size=experts))
    return load, Fleet(tuple(sizes), speed_of_rank=speeds, dead_ranks=dead)


def placements(experts, fleet):
    live = [rank not in fleet.dead_ranks for rank, n in enumerate(fleet.slots_by_rank) for _ in range(n)]
    for row in product(*[range(experts) if alive else (0,) for alive in live]):
        if len({e for e, alive in zip(row, live, strict=True) if alive}) == experts:
            yield row


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=small())
def test_no_placement_is_below_the_bound(case):
    load, fleet = case
    rows = np.array(list(placements(len(load), fleet)), dtype=np.int32)
    load_LE = np.tile(load, (len(rows), 1))
    tried = Placement(rows, fleet, len(load))
    for dispatch in ("even", "waterfill"):
        bound = lower_bound([load], fleet, dispatch)[0]
        assert bound >= 0
        assert predicted(load_LE, tried, dispatch).min() >= bound - 1e-9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=small(), data=st.data())
def test_the_best_split_is_the_least_cut(case, data):
    load, fleet = case
    rows = list(placements(len(load), fleet))
    row = rows[data.draw(st.integers(0, len(rows) - 1))]
    placement = Placement(np.array([row], dtype=np.int32), fleet, len(load))
    np.testing.assert_allclose(
        predicted([load], placement, "waterfill"), max(least_by_cuts(load, row, fleet), 0), atol=1e-9
    )
    assert predicted([load], placement, "waterfill") <= predicted([load], placement) + 1e-9


def test_even_prediction_is_that_of_the_loads_of_ranks():
    rng = np.random.default_rng(0)
    fleet = Fleet((3, 0, 4, 2), speed_of_rank=(1.0, 1.0, 0.5, 2.0), dead_ranks=frozenset({3}))
    rows = np.array([[*rng.permutation([0, 1, 2, 3, 4, 0, 1]), 5, 5] for _ in range(4)], dtype=np.int32)
    load = rng.lognormal(0, 1, (4, 5))
    placement = Placement(np.minimum(rows, 4).astype(np.int32), fleet, 5)
    np.testing.assert_allclose(predicted(load, placement), imbalance(rank_load(load, placement), fleet))


@pytest.mark.parametrize(
    ("load", "fleet", "wanted"),
    [
        ([1, 1, 1, 1], Fleet.even(2, 4), 0.0),
        ([6, 1, 1], Fleet.even(3, 3), 1.25),  # B2: no slot to halve the 6; (6 - 8/3) / (8/3)
        ([6, 1, 1], Fleet.even(3, 4), 0.125),  # halved
        ([9, 1, 1, 1, 1, 1], Fleet.even(2, 6), 11 / 7 - 1),  # B3: the host of the 9 must take two more
        ([8, 0], Fleet((2, 2), speed_of_rank=(3.0, 1.0)), 0.0),
        ([8, 0], Fleet((1, 1), speed_of_rank=(3.0, 1.0)), 1 / 3),
        ([0, 0], Fleet.even(2, 2), 0.0),
        ([5, 5], Fleet((1, 0, 1)), 0.5),  # a rank without slots has no work
    ],
)
def test_bounds_by_hand(load, fleet, wanted):
    np.testing.assert_allclose(lower_bound([load], fleet), [wanted], atol=1e-9)


def test_the_cardinality_bound_is_what_proves_hot_experts():
    """Four experts take 40 %: their ranks' other slots must hold cold experts; neither mean nor shares tell that."""
    load = np.full((1, 256), 0.6 / 252)
    load[0, :4] = 0.1
    assert lower_bound(load, Fleet.even(72, 288))[0] > 0.15
    assert lower_bound(load, Fleet.even(72, 432))[0] < 1e-9


def test_unknown_rules_are_refused():
    with pytest.raises(ConfigError, match="dispatch = 'evne'"):
        lower_bound([[1.0]], Fleet.even(1, 1), "evne")
