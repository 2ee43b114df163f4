"""The sampler: which tokens may be drawn and how often, penalties by hand, seeds, and reported log probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.engine.sampler import Sampler, draw, logprobs
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams


def sequence(prompt=(1,), outputs=(), seed=0, **params) -> Sequence:
    made = Sequence("a", list(prompt), SamplingParams(max_tokens=None, **params), max_tokens=100, seed=seed)
    made.tokens.extend(outputs)
    return made


def adjusted(logits, seq: Sequence, eos=()) -> torch.Tensor:
    """The logits the sampler would draw from."""
    row = torch.tensor(logits, dtype=torch.float32)
    Sampler(eos)._adjust(row, seq)
    return row


# -- which tokens may be drawn, and how often --------------------------------------------------------------------------


def allowed_distribution(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The plain definition, in float64: temperature, then min_p, top_k, top_p, each on what the last one left."""
    z = logits.astype(np.float64) / p.temperature
    prob = np.exp(z - z.max())
    prob /= prob.sum()
    keep = prob >= p.min_p * prob.max()
    if p.top_k > 0:
        order = np.argsort(-np.where(keep, prob, -1.0), kind="stable")
        keep &= np.isin(np.arange(len(prob)), order[: p.top_k])
    prob = np.where(keep, prob, 0.0)
    prob /= prob.sum()
    total = 0.0
    out = np.zeros_like(prob)
    for token in np.argsort(-prob, kind="stable"):  # the first tokens that together reach top_p
        if total >= p.top_p:
            break
        out[token] = prob[token]
        total += prob[token]
    return out / out.sum()


SETTINGS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=2.5),
    dict(top_k=3),
    dict(top_k=1),
    dict(top_k=100),
    dict(top_k=-1),
    dict(top_p=0.7),
    dict(top_p=0.05),
    dict(min_p=0.2),
    dict(min_p=1.0),
    dict(temperature=1.7, top_k=6, top_p=0.8, min_p=0.05),
    dict(temperature=0.8, top_k=4, top_p=0.9),
]


@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: ",".join(f"{k}={v}" for k, v in p.items()) or "plain")
def test_draws_follow_the_plain_definition(params):
    """Chi-square over 3,000 seeds below mean + 5 deviations, and never a token outside the allowed set."""
    logits = np.array([2.0, 1.1, 0.3, -0.4, 1.6, -1.9, 0.8, -0.9, 0.1, -3.1])
    seqs = [sequence(seed=seed, **params) for seed in range(3000)]
    drawn = Sampler(()).sample(torch.tensor(np.tile(logits, (len(seqs), 1))), seqs)
    count = np.bincount(drawn, minlength=len(logits))
    expected = allowed_distribution(logits, seqs[0].params) * len(seqs)
    assert count[expected == 0].sum() == 0
    allowed = expected > 0
    freedom = allowed.sum() - 1
    chi = float(((count - expected)[allowed] ** 2 / expected[allowed]).sum())
    assert chi <= freedom + 5 * math.sqrt(2 * freedom)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_a_token_outside_the_allowed_set_is_never_drawn(seed, vocabulary, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=vocabulary) * 2
    params = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    seq = sequence(seed=seed, **params)
    token = draw(torch.tensor(logits, dtype=torch.float32), seq)
    # a hair wider than asked: at the very border float32 and float64 may differ
    wider = SamplingParams(**{**params, "top_p": min(1.0, top_p + 1e-5), "min_p": max(0.0, min_p - 1e-5)})
    assert allowed_distribution(logits, wider)[token] > 0


def test_equal_logits_at_the_border_of_top_k_all_stay():
    seen = {draw(torch.tensor([1.0, 1.0, 0.0]), sequence(seed=s, top_k=1)) for s in range(50)}
    assert seen == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-45])
def test_temperature_zero_takes_the_most_likely(temperature):
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 3.0, 2.9], [90.0, 3.0, 91.0]])
    rows = [sequence(seed=s, temperature=temperature, top_k=2, top_p=0.5) for s in range(3)]
    assert Sampler(()).sample(logits, rows) == [1, 0, 2]


def test_a_very_low_temperature_and_impossible_tokens_draw_sensibly():
    logits = torch.tensor([[-1e4, 20.0, -math.inf, 1e4]])
    for seed in range(20):
        assert Sampler(()).sample(logits, [sequence(seed=seed, temperature=2e-5)]) == [3]
        assert Sampler(()).sample(logits, [sequence(seed=seed, temperature=100.0)]) != [2]


def test_the_token_that_reaches_top_p_is_the_last_to_stay():
    seen = {draw(torch.zeros(4), sequence(seed=s, top_p=0.5)) for s in range(50)}
    assert seen == {0, 1}, "two of four equal ones make exactly a half"


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.randn(1, 800, generator=torch.Generator().manual_seed(0)).bfloat16()
    for seed in range(200):
        rows = [sequence(seed=seed, top_p=0.9, temperature=0.7)]
        assert Sampler(()).sample(logits, rows) == Sampler(()).sample(logits.float(), rows)


# -- penalties and min_tokens -----------------------------------------------------------------------------------------


def test_presence_and_frequency_count_outputs_only():
    seq = sequence(prompt=(0, 0, 4), outputs=(1, 2, 2, 2), presence_penalty=0.5, frequency_penalty=0.25)
    got = adjusted([1.0, 1.0, 1.0, 1.0, 1.0], seq)
    assert got.tolist() == [1.0, 1.0 - 0.5 - 0.25, 1.0 - 0.5 - 0.75, 1.0, 1.0]


def test_negative_penalties_encourage():
    seq = sequence(outputs=(0, 0), presence_penalty=-1.0, frequency_penalty=-0.5)
    assert adjusted([0.0, 0.0], seq).tolist() == [2.0, 0.0]


def test_repetition_penalty_shrinks_positive_and_lowers_negative_logits_of_prompt_and_output():
    seq = sequence(prompt=(0, 1, 1), outputs=(3,), repetition_penalty=2.0)
    assert adjusted([3.0, -3.0, 3.0, -1.0, 0.0], seq).tolist() == [1.5, -6.0, 3.0, -2.0, 0.0]


def test_repetition_comes_before_the_other_two():
    seq = sequence(prompt=(5,), outputs=(0,), repetition_penalty=2.0, presence_penalty=1.0)
    assert adjusted([4.0, 4.0, 0, 0, 0, 0], seq).tolist()[:2] == [4.0 / 2 - 1.0, 4.0]


def test_penalties_change_the_choice_but_not_the_logits_given():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    before = logits.clone()
    rows = [sequence(prompt=(2,), outputs=(0,), temperature=0.0, presence_penalty=0.5)]
    assert Sampler(()).sample(logits, rows) == [1]
    assert torch.equal(logits, before), "log probabilities are reported from these"


def test_a_penalty_touches_its_own_row_only():
    logits = torch.tensor([[2.0, 1.9]] * 3)
    plain = sequence(outputs=(0,), temperature=0.0)
    punished = sequence(outputs=(0,), temperature=0.0, frequency_penalty=1.0)
    assert Sampler(()).sample(logits, [plain, punished, plain]) == [0, 1, 0]


@pytest.mark.parametrize(("outputs", "token"), [((), 2), ((3,), 2), ((3, 3), 0)])
def test_min_tokens_masks_the_end_and_stop_tokens(outputs, token):
    """Until two tokens are out, neither the end (0) nor the stop token (1) may come."""
    for other in ({}, {"presence_penalty": 0.1}):
        seq = sequence(outputs=outputs, temperature=0.0, min_tokens=2, stop_token_ids=[1], **other)
        assert Sampler([0]).sample(torch.tensor([[9.0, 8.0, 7.0, 6.0]]), [seq]) == [token]


def test_min_tokens_holds_for_drawn_tokens_too():
    rows = [sequence(seed=seed, min_tokens=1, temperature=5.0) for seed in range(300)]
    drawn = Sampler([0, 2]).sample(torch.zeros(300, 4), rows)
    assert set(drawn) == {1, 3}


def test_end_tokens_beyond_the_vocabulary_do_not_matter():
    seq = sequence(temperature=0.0, min_tokens=5, stop_token_ids=[77])
    assert Sampler([99]).sample(torch.tensor([[1.0, 2.0]]), [seq]) == [1]
    assert Sampler([]).sample(torch.tensor([[1.0, 2.0]]), [sequence(temperature=0.0, min_tokens=5)]) == [1]


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_and_position_draw_the_same_whatever_else_is_in_the_batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, generator=generator)
    alone = Sampler(()).sample(logits[None], [sequence(seed=11, outputs=(1, 2))])[0]
    for size in (2, 5, 9):
        for row in range(size):
            others = torch.randn(size, 50, generator=generator)
            others[row] = logits
            rows = [sequence(seed=100 + i, temperature=0.0 if i % 2 else 1.0) for i in range(size)]
            rows[row] = sequence(seed=11, outputs=(7, 8))  # other tokens, the same position
            assert Sampler(()).sample(others, rows)[row] == alone


def test_seeds_and_positions_differ_from_each_other():
    logits = torch.zeros(1000)
    by_seed = [draw(logits, sequence(seed=s)) for s in range(40)]
    by_position = [draw(logits, sequence(outputs=(0,) * n)) for n in range(40)]
    assert len(set(by_seed)) > 30
    assert len(set(by_position)) > 30
    assert by_seed != by_position


def test_draws_of_one_sequence_are_spread_like_those_of_many():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    drawn = [draw(logits, sequence(seed=5, outputs=(0,) * n)) for n in range(2000)]
    share = np.bincount(drawn, minlength=3) / 2000
    assert np.abs(share - [0.5, 0.3, 0.2]).max() < 4 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize("seed", [-1, -(1 << 63), 0, (1 << 63) - 1, (1 << 64) - 1])
def test_any_seed_of_64_bits_is_repeatable(seed):
    logits = torch.linspace(0, 1, 500)
    assert draw(logits, sequence(seed=seed)) == draw(logits, sequence(seed=seed))


# -- log probabilities ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(1, 30), count=st.integers(0, 40), token=st.integers(0, 29))
def test_logprobs_hold_the_sampled_token_first_then_the_most_likely(seed, vocabulary, count, token):
    token %= vocabulary
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    entries = logprobs(logits, [token], [count])[0]
    table = torch.log_softmax(logits[0].double(), -1)
    order = table.argsort(descending=True).tolist()
    assert entries[0][0] == token
    best = order[:count]
    assert [t for t, _, _ in entries[1:]] == [t for t in best if t != token]
    for t, value, rank in entries:
        assert value == pytest.approx(float(table[t]), abs=1e-5)
        assert rank == order.index(t) + 1


def test_logprobs_of_several_rows_with_counts_of_their_own():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    got = logprobs(logits, [0, 0], [2, 0])
    assert [(t, rank) for t, _, rank in got[0]] == [(0, 3), (2, 1), (1, 2)]
    assert [(t, rank) for t, _, rank in got[1]] == [(0, 1)]


def test_logprobs_are_those_of_the_raw_logits():
    """Before temperature, penalties and masks: what the model said, not what was drawn from."""
    logits = torch.tensor([[1.0, 3.0]])
    seq = sequence(outputs=(1,), temperature=0.1, presence_penalty=2.0, repetition_penalty=3.0)
    token = Sampler([1]).sample(logits, [seq])[0]
    entry = logprobs(logits, [token], [0])[0][0]
    assert entry[1] == pytest.approx(float(torch.log_softmax(logits[0], -1)[token]))


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.tensor([[4.0, 2.0, -1.0]])
    assert logprobs(logits.bfloat16(), [1], [3]) == logprobs(logits, [1], [3])
