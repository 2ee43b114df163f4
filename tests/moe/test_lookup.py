"""From experts to slots: replicas are used evenly, the same way every time, and differently by each rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.moe.lookup import Even

CPU = torch.device("cpu")


def lookup(expert_G: list[int], rank: int = 0, num_ranks: int = 2) -> Even:
    row = np.array([expert_G], dtype=np.int32)
    return Even(Placement(row, Fleet.even(num_ranks, len(expert_G)), max(expert_G) + 1), 0, rank, CPU)


def test_without_replicas_an_expert_has_one_slot():
    chosen = lookup([2, 0, 3, 1])(torch.tensor([[0, 1], [2, 3]]))
    assert chosen.tolist() == [[1, 3], [0, 2]]  # where each expert stands in the row
    assert chosen.dtype == torch.int64


def test_replicas_in_turn_from_the_own_number():
    """Expert 0 stands in slots 0, 2 and 4. Its five tokens take them in turn; rank 1 starts at the second."""
    expert_TK = torch.tensor([[0], [0], [1], [0], [0], [0]])
    expert_G = [0, 1, 0, 2, 0, 3]
    assert lookup(expert_G, rank=0)(expert_TK).flatten().tolist() == [0, 2, 1, 4, 0, 2]
    assert lookup(expert_G, rank=1)(expert_TK).flatten().tolist() == [2, 4, 1, 0, 2, 4]


def test_repeated_expert_within_a_token_counts_as_two():
    assert lookup([0, 0, 1, 2])(torch.tensor([[0, 0], [0, 2]])).tolist() == [[0, 1], [0, 3]]


def test_no_tokens():
    assert lookup([0, 0, 1])(torch.empty((0, 2), dtype=torch.int64)).shape == (0, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), num_experts=st.integers(1, 12), extra=st.integers(0, 12), rank=st.integers(0, 9))
def test_replicas_within_one_token_of_each_other(data, num_experts, extra, rank):
    more = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=extra, max_size=extra))
    expert_G = data.draw(st.permutations([*range(num_experts), *more]))
    draws = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=120))
    K = data.draw(st.sampled_from([k for k in (1, 2, 3, 4) if len(draws) % k == 0]))
    expert_TK = torch.tensor(draws).view(-1, K)
    table = lookup(expert_G, rank, num_ranks=1)
    slot_TK = table(expert_TK)
    assert torch.equal(torch.tensor(expert_G)[slot_TK], expert_TK)  # each slot does hold the expert
    assert torch.equal(slot_TK, table(expert_TK))  # nothing is remembered
    count_G = torch.bincount(slot_TK.flatten(), minlength=len(expert_G))
    for expert in range(num_experts):
        own = count_G[torch.tensor(expert_G) == expert]
        assert own.max() - own.min() <= 1


def test_ranks_start_at_different_replicas():
    """One token for a replicated expert on each of four ranks: together they use all four replicas."""
    slots = [lookup([0, 1, 0, 2, 0, 3, 0, 4], rank=rank, num_ranks=4)(torch.tensor([[0]])).item() for rank in range(4)]
    assert slots == [0, 2, 4, 6]


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_have_their_own_rows(layer):
    rows = np.array([[0, 1, 2], [2, 0, 1]], dtype=np.int32)
    table = Even(Placement(rows, Fleet.even(1, 3), 3), layer, 0, CPU)
    assert table(torch.tensor([[0, 1, 2]])).tolist() == [[[0, 1, 2], [1, 2, 0]][layer]]
