"""Simulated routing reaches the load it is asked for, with K different experts a token, and refuses what it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.fleet import Fleet
from nonet.errors import ConfigError
from nonet.moe.simulate import simulated


def route(strategy: str, tokens: int, num_experts: int, top_k: int, num_ranks: int = 1, steps: int = 1, seed: int = 3):
    """(expert_TK, weight_TK) of `tokens` tokens in each of some steps."""
    rule = simulated(strategy, num_experts, top_k, num_ranks, seed)
    outs = [rule(torch.zeros(tokens, num_experts)) for _ in range(steps)]
    return torch.cat([expert for expert, _ in outs]), torch.cat([weight for _, weight in outs])


def imbalance(expert_TK: torch.Tensor, num_experts: int, num_ranks: int) -> float:
    """(max - mean) / mean over ranks with experts in order."""
    edges = np.array(Fleet.even(num_ranks, num_experts).first_slot[1:])
    load = np.bincount(np.searchsorted(edges, expert_TK.flatten().numpy(), side="right"), minlength=num_ranks)
    return float((load.max() - load.mean()) / load.mean())


STRATEGIES = ["uniform_random", "round_robin", "zipf", "zipf:0.5", "zipf:3", "imbalance:0", "imbalance:0.7"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(32, 4), (22, 5), (8, 1), (7, 3)])
def test_every_token_gets_k_different_experts(strategy, num_experts, top_k):
    expert_TK, weight_TK = route(strategy, 301, num_experts, top_k, num_ranks=4 if num_experts >= 8 else 2)
    assert expert_TK.shape == weight_TK.shape == (301, top_k)
    assert expert_TK.dtype == torch.int64
    assert weight_TK.dtype == torch.float32
    assert expert_TK.min() >= 0
    assert expert_TK.max() < num_experts
    assert all(len(set(row)) == top_k for row in expert_TK.tolist())
    assert torch.equal(weight_TK, torch.full_like(weight_TK, 1 / top_k))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_experts_for_every_token(strategy):
    if strategy == "imbalance:0.7":
        pytest.skip("all experts for every token leave no room for imbalance")
    expert_TK, _ = route(strategy, 9, 6, 6, num_ranks=2)
    assert all(sorted(row) == list(range(6)) for row in expert_TK.tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_tokens(strategy):
    expert_TK, weight_TK = route(strategy, 0, 8, 2, num_ranks=2)
    assert expert_TK.shape == weight_TK.shape == (0, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_gives_the_same_tokens(strategy):
    first, again, other = (route(strategy, 64, 16, 4, num_ranks=2, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (strategy == "round_robin")


def test_uniform_is_uniform():
    expert_TK, _ = route("uniform_random", 8000, 16, 4)
    share = torch.bincount(expert_TK.flatten(), minlength=16) / 8000
    assert (share - 0.25).abs().max() < 0.02  # four standard deviations


@pytest.mark.parametrize(("num_experts", "top_k", "sizes"), [(8, 2, [3, 0, 5, 1]), (22, 5, [7, 7]), (5, 5, [2, 3])])
def test_round_robin_is_exact_over_calls(num_experts, top_k, sizes):
    rule = simulated("round_robin", num_experts, top_k, 1, 0)
    flat = torch.cat([rule(torch.zeros(size, num_experts))[0].flatten() for size in sizes])
    assert flat.tolist() == [i % num_experts for i in range(sum(sizes) * top_k)]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_zipf_follows_its_law(exponent):
    """With a token's experts few among many, expert e is drawn in proportion to (e + 1) ** -exponent."""
    expert_TK, _ = route("zipf" if exponent == 1 else f"zipf:{exponent}", 20000, 64, 1)
    share = torch.bincount(expert_TK.flatten(), minlength=64) / 20000
    wanted = torch.arange(1, 65).float() ** -exponent
    wanted /= wanted.sum()
    assert (share - wanted).abs().max() < 0.015
    assert (share[:4] / wanted[:4] - 1).abs().max() < 0.12


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(32, 4), (22, 2)])
def test_requested_imbalance_is_reached(ratio, num_ranks, num_experts, top_k):
    if ratio > num_ranks - 1:
        ratio = num_ranks - 1.0
    hot = (1 + ratio) / num_ranks * top_k
    if hot > -(-num_experts // num_ranks):
        pytest.skip("the first rank has too few experts for that")
    expert_TK, _ = route(f"imbalance:{ratio}", 256, num_experts, top_k, num_ranks, steps=20)
    got = imbalance(expert_TK, num_experts, num_ranks)
    if ratio == 0 and num_experts % num_ranks:  # a rank with fewer experts still gets its full share of the rest
        assert got < 0.35
    else:
        assert abs(got - ratio) < 0.03


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_ranks=st.integers(2, 8), per_rank=st.integers(1, 6), top_k=st.integers(1, 6), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_reachable_imbalance(num_ranks, per_rank, top_k, share, seed):
    num_experts = num_ranks * per_rank
    top_k = min(top_k, num_experts)
    most = min(num_ranks - 1, per_rank * num_ranks / top_k - 1)
    ratio = round(share * max(0.0, most), 3)
    expert_TK, _ = route(f"imbalance:{ratio}", 400, num_experts, top_k, num_ranks, steps=2, seed=seed)
    assert all(len(set(row)) == top_k for row in expert_TK.tolist())
    assert abs(imbalance(expert_TK, num_experts, num_ranks) - ratio) < 0.06


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        ("uniform", "did you mean 'uniform_random'?"),
        ("roundrobin", "did you mean 'round_robin'?"),
        ("whatever", "known: imbalance, round_robin, uniform_random, zipf"),
        ("", "known: imbalance, round_robin, uniform_random, zipf"),
        ("uniform_random:2", "did you mean 'uniform_random'?"),
        ("round_robin:1", "did you mean 'round_robin'?"),
        ("zipf:steep", "'steep' is not a number"),
        ("imbalance", "the ratio over 4 ranks is between 0 and 3"),
        ("imbalance:-1", "the ratio over 4 ranks is between 0 and 3"),
        ("imbalance:3.5", "the ratio over 4 ranks is between 0 and 3"),
        ("imbalance:nan", "the ratio over 4 ranks is between 0 and 3"),
        ("imbalance:1.5", "rank 0 has 2 experts for top-4: at most 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused(strategy, remedy):
    with pytest.raises(ConfigError) as caught:
        simulated(strategy, 8, 4, 4, 0)
    assert caught.value.field == "routing_simulation"
    assert caught.value.value == strategy
    assert caught.value.remedy == remedy
