"""Fleets: what may be said of ranks, and what contradicts itself."""

from __future__ import annotations

import pytest

from nonet.config.fleet import Fleet
from nonet.errors import ConfigError


def test_what_is_left_out_means_the_usual():
    fleet = Fleet.even(3, 7)
    assert fleet == Fleet((3, 2, 2))
    assert (fleet.nodes, fleet.speeds, fleet.live_ranks) == ((0, 0, 0), (1.0, 1.0, 1.0), (0, 1, 2))


def test_what_is_given_is_kept():
    fleet = Fleet((2, 2), node_of_rank=(1, 0), speed_of_rank=(0.5, 2.0), dead_ranks=frozenset({0}))
    assert (fleet.nodes, fleet.speeds, fleet.live_ranks) == ((1, 0), (0.5, 2.0), (1,))
    assert fleet.num_slots == 4  # slots of dead ranks keep their numbers
    assert hash(fleet) == hash(Fleet((2, 2), (1, 0), (0.5, 2.0), frozenset({0})))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (dict(node_of_rank=(0,)), "node_of_rank", 1),
        (dict(speed_of_rank=(1.0, 1.0, 1.0)), "speed_of_rank", 3),
        (dict(node_of_rank=(0, -1)), "node_of_rank", -1),
        (dict(speed_of_rank=(1.0, 0.0)), "speed_of_rank", 0.0),
        (dict(speed_of_rank=(1.0, float("inf"))), "speed_of_rank", float("inf")),
        (dict(dead_ranks=frozenset({2})), "dead_ranks", 2),
    ],
)
def test_contradictions_are_refused(arguments, field, value):
    with pytest.raises(ConfigError) as caught:
        Fleet((1, 1), **arguments)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_negative_slots_are_refused():
    with pytest.raises(ConfigError, match="slots_by_rank = -1"):
        Fleet((1, -1))
