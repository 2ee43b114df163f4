"""Load by rank and imbalance, by hand and as laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb.load import imbalance, rank_load
from nonet.eplb.placement import Placement


def test_rank_load_by_hand():
    """Expert 0 has 12 tokens over two replicas, on ranks 0 and 1; the others live once."""
    placement = Placement(np.array([[0, 1, 2, 0]], dtype=np.int32), Fleet.even(2, 4), 3)
    assert rank_load(np.array([[12, 3, 5]]), placement).tolist() == [[6 + 3, 5 + 6]]


def test_replicas_on_one_rank_add_up():
    placement = Placement(np.array([[0, 0, 1, 2]], dtype=np.int32), Fleet.even(2, 4), 3)
    assert rank_load(np.array([[10, 1, 2]]), placement).tolist() == [[10, 3]]


def test_layers_are_apart():
    rows = np.array([[0, 1], [1, 0]], dtype=np.int32)
    placement = Placement(rows, Fleet.even(2, 2), 2)
    assert rank_load(np.array([[8, 1], [8, 1]]), placement).tolist() == [[8, 1], [1, 8]]


@pytest.mark.parametrize(
    ("load", "wanted"),
    [([5, 5, 5, 5], 0.0), ([8, 0, 0, 0], 3.0), ([6, 2], 0.5), ([0, 0], 0.0), ([7], 0.0), ([3, 1, 2], 0.5)],
)
def test_imbalance_by_hand(load, wanted):
    assert imbalance(np.array([load], dtype=float)).tolist() == [wanted]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), num_experts=st.integers(1, 20), extra=st.integers(0, 20), num_ranks=st.integers(1, 8))
def test_no_token_is_lost_and_imbalance_is_bounded(data, num_experts, extra, num_ranks):
    slots = num_experts + extra
    order = data.draw(st.permutations([g % num_experts for g in range(slots)]))
    load = data.draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    placement = Placement(np.array([order], dtype=np.int32), Fleet.even(num_ranks, slots), num_experts)
    load_LR = rank_load(np.array([load]), placement)
    np.testing.assert_allclose(load_LR.sum(), sum(load))
    (uneven,) = imbalance(load_LR)
    assert -1e-9 <= uneven <= num_ranks - 1 + 1e-9
    np.testing.assert_allclose(imbalance(3 * load_LR), [uneven], atol=1e-9)
