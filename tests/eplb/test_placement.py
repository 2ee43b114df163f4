"""Placements: what lies where, derived from one array, and what a user's own assignment must satisfy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet, split_evenly
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError


def test_contiguous_by_hand():
    """Eight experts in ten slots over four ranks: three, three, two and two slots; experts 0 and 1 twice."""
    placement = Placement.contiguous(2, 8, 4, 10)
    assert placement.expert_LG.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 2
    assert [placement.experts_on(rank, 1) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7], [0, 1]]
    assert placement.rank_of_slot().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert placement.num_layers == 2


def test_replicas_by_hand():
    row = np.array([[2, 0, 2, 1, 2]], dtype=np.int32)
    slot_EC, count_E = Placement(row, Fleet.even(1, 5), 3).replicas(0)
    assert count_E.tolist() == [1, 1, 3]
    assert slot_EC.tolist() == [[1, 1, 1], [3, 3, 3], [0, 2, 4]]  # unused entries repeat
    assert slot_EC.dtype == count_E.dtype == np.int64


def test_one_slot_an_expert_by_default():
    placement = Placement.contiguous(1, 22, 4)
    assert placement.fleet.slots_by_rank == (6, 6, 5, 5)
    assert sum((placement.experts_on(rank, 0) for rank in range(4)), []) == list(range(22))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(num_experts=st.integers(1, 40), extra=st.integers(0, 40), num_ranks=st.integers(1, 12), layers=st.integers(1, 3))
def test_every_view_agrees_with_the_array(num_experts, extra, num_ranks, layers):
    placement = Placement.contiguous(layers, num_experts, num_ranks, num_experts + extra)
    rank_G = placement.rank_of_slot()
    for layer in range(layers):
        slot_EC, count_E = placement.replicas(layer)
        assert count_E.sum() == num_experts + extra
        assert count_E.min() >= 1
        assert count_E.max() - count_E.min() <= 1  # contiguous repeats evenly
        for expert in range(num_experts):
            own = slot_EC[expert, : count_E[expert]]
            assert list(own) == sorted(set(own))
            assert (placement.expert_LG[layer, slot_EC[expert]] == expert).all()
        for rank in range(num_ranks):
            assert placement.experts_on(rank, layer) == placement.expert_LG[layer, rank_G == rank].tolist()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(count=st.integers(0, 200), parts=st.integers(1, 40))
def test_split_evenly(count, parts):
    shares = split_evenly(count, parts)
    assert sum(shares) == count
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)


def test_fleet_by_hand():
    fleet = Fleet((3, 0, 2))
    assert (fleet.num_ranks, fleet.num_slots, fleet.first_slot) == (3, 5, (0, 3, 3, 5))


# -- assignments given by the user ----------------------------------------------------------------------------------


def assign(assignments, num_slots=4):
    return Placement.from_assignments(assignments, [1, 3], 3, num_slots, 2)


def test_assignments_by_model_layer():
    placement = assign({3: [2, 1, 0, 0], 1: [0, 1, 2, 2]})
    assert placement.expert_LG.tolist() == [[0, 1, 2, 2], [2, 1, 0, 0]]  # in order of layers, not of the mapping
    assert placement.experts_on(1, 0) == [2, 2]


GOOD = [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("assignments", "value", "remedy"),
    [
        ({1: GOOD, 2: GOOD}, 2, "layer 2 holds no experts; these do: [1, 3]"),
        ({1: GOOD}, [1], "layer 3 is missing; give every MoE layer"),
        ({1: GOOD, 3: [0, 1, 2]}, 3, "layer 3 must name an expert for each of 4 slots"),
        ({1: GOOD, 3: [0, 1, 2, 3]}, 3, "layer 3: experts are 0 to 2"),
        ({1: GOOD, 3: [0, 1, -1, 2]}, -1, "layer 3: experts are 0 to 2"),
        ({1: [0, 0, 2, 2], 3: GOOD}, 1, "layer 1: this expert has no slot; every expert needs one"),
    ],
)
def test_wrong_assignments_are_refused(assignments, value, remedy):
    with pytest.raises(ConfigError) as caught:
        assign(assignments)
    assert (caught.value.field, caught.value.value, caught.value.remedy) == (
        "initial_global_assignments", value, remedy,
    )  # fmt: skip


def test_planning_needs_no_torch():
    script = "import sys, nonet.eplb.placement, nonet.eplb.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
