"""When requests are due, and what they are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nonet.bench.datasets import Sample, check_length, samples
from nonet.bench.options import DatasetOptions, TrafficOptions
from nonet.bench.rates import arrivals
from nonet.bench.words import Words
from nonet.config.checkpoint import SHIPPED
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import ConfigError


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(Tokenizer(str(SHIPPED / "nonet-tiny")), 8192)


# ---------------------------------------------------------------- arrivals


def test_all_at_once():
    assert arrivals(5, TrafficOptions(), seed=0) == [0.0] * 5


def test_a_rate_is_kept_as_a_whole():
    due = arrivals(400, TrafficOptions(request_rate=8.0), seed=3)
    assert due == sorted(due)
    assert due[-1] == pytest.approx(400 / 8)
    gaps = np.diff([0.0, *due])
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.15)  # exponential: deviation = mean


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_gamma(burstiness):
    gaps = np.diff([0.0, *arrivals(4000, TrafficOptions(request_rate=8.0, burstiness=burstiness), seed=1)])
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)


def test_the_seed_decides():
    traffic = TrafficOptions(request_rate=2.0)
    assert arrivals(20, traffic, 1) == arrivals(20, traffic, 1)
    assert arrivals(20, traffic, 1) != arrivals(20, traffic, 2)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 5.5), ("exponential", math.sqrt(10))])
def test_ramp_up(strategy, middle):
    """Nearly even gaps: rates can be read off them."""
    traffic = TrafficOptions(
        ramp_up_strategy=strategy, ramp_up_start_rps=1, ramp_up_end_rps=10, burstiness=1e6
    )
    gaps = np.diff([0.0, *arrivals(1000, traffic, seed=0)])
    assert 1 / gaps[:10].mean() == pytest.approx(1, rel=0.1)
    assert 1 / gaps[495:505].mean() == pytest.approx(middle, rel=0.1)
    assert 1 / gaps[-10:].mean() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"ramp_up_start_rps": 1}, "--ramp-up-strategy"),
        ({"ramp_up_strategy": "linear"}, "--ramp-up-strategy"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 2, "request_rate": 3},
         "--request-rate"),
        ({"ramp_up_strategy": "exponential", "ramp_up_start_rps": 0, "ramp_up_end_rps": 2}, "--ramp-up-start-rps"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 3, "ramp_up_end_rps": 2}, "--ramp-up-start-rps"),
    ],
)  # fmt: skip
def test_contradictions_of_traffic(given, field):
    with pytest.raises(ConfigError) as caught:
        arrivals(3, TrafficOptions(**given), 0)
    assert caught.value.field == field


# ---------------------------------------------------------------- random


def test_random_ids_have_the_length_asked_for(words):
    options = DatasetOptions(num_prompts=5, random_input_len=12, random_output_len=3, random_prefix_len=4)
    found = samples(options, words, text=False)
    assert [(len(s.prompt), s.prompt_len, s.output_len) for s in found] == [(16, 16, 3)] * 5
    assert len({tuple(s.prompt[:4]) for s in found}) == 1
    assert len({tuple(s.prompt[4:]) for s in found}) == 5
    assert all(0 <= token < 8192 for s in found for token in s.prompt)


def test_random_text_has_the_tokens_asked_for(words):
    found = samples(DatasetOptions(num_prompts=8, random_input_len=50, random_output_len=1), words, text=True)
    for sample in found:
        assert words.count(sample.prompt) == sample.prompt_len == 50


def test_random_lengths_are_drawn_from_the_range(words):
    options = DatasetOptions(num_prompts=300, random_input_len=20, random_output_len=10, random_range_ratio=0.5)
    found = samples(options, words, text=False)
    assert {s.prompt_len for s in found} == set(range(10, 31))
    assert {s.output_len for s in found} == set(range(5, 16))


def test_general_lengths_win_and_the_seed_decides(words):
    options = DatasetOptions(num_prompts=3, input_len=7, output_len=2, seed=4)
    found = samples(options, words, text=False)
    assert [(s.prompt_len, s.output_len) for s in found] == [(7, 2)] * 3
    assert found == samples(options, words, text=False)
    assert found != samples(options.model_copy(update={"seed": 5}), words, text=False)


def test_no_tokenizer_but_a_vocabulary_is_enough_for_ids():
    found = samples(DatasetOptions(num_prompts=2, input_len=50, output_len=2), Words(None, 10), text=False)
    assert {token for s in found for token in s.prompt} <= set(range(10))
    with pytest.raises(ConfigError, match="--tokenizer = None: random prompts need one"):
        samples(DatasetOptions(num_prompts=1), Words(None), text=True)


# ---------------------------------------------------------------- files


def conversation(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_sharegpt(words, tmp_path):
    path = tmp_path / "chats.json"
    short, empty = conversation("Hi", "a long answer to a short question"), {"conversations": []}
    plain = conversation("Tell me about the sea and its ships, please.", "The sea is wide, and ships sail on it.")
    huge = conversation("word " * 1500, "an answer that is long enough")
    path.write_text(json.dumps([short, empty, plain, huge]))
    options = DatasetOptions(dataset_name="sharegpt", dataset_path=path, num_prompts=2)
    expected = Sample(
        plain["conversations"][0]["value"],
        words.count(plain["conversations"][0]["value"]),
        words.count(plain["conversations"][1]["value"]),
    )
    assert samples(options, words, text=True) == [expected] * 2  # made twice: there is one
    assert len(samples(options.model_copy(update={"no_oversample": True}), words, text=True)) == 1
    fixed = samples(options.model_copy(update={"sharegpt_output_len": 9}), words, text=True)
    assert {s.output_len for s in fixed} == {9}


def test_custom(words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}", "output_tokens": i + 1}) + "\n" for i in range(3)))
    options = DatasetOptions(
        dataset_name="custom", dataset_path=path, num_prompts=3, custom_output_len=-1, disable_shuffle=True
    )
    found = samples(options, words, text=True)
    assert [(s.prompt, s.output_len) for s in found] == [("prompt 0", 1), ("prompt 1", 2), ("prompt 2", 3)]
    assert {s.output_len for s in samples(options.model_copy(update={"custom_output_len": 5}), words, text=True)} == {5}
    shuffled = [s.prompt for s in samples(options.model_copy(update={"disable_shuffle": False}), words, text=True)]
    assert sorted(shuffled) == [s.prompt for s in found]


def test_sonnet(words, tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("\n".join(f"This is the line of number {i} of a poem," for i in range(30)))
    options = DatasetOptions(
        dataset_name="sonnet", dataset_path=path, num_prompts=4, sonnet_input_len=150, sonnet_prefix_len=60
    )
    found = samples(options, words, text=True)
    assert all(100 < s.prompt_len <= 150 and s.output_len == 150 for s in found)
    starts = {s.prompt[:150] for s in found}
    assert len(starts) == 1
    assert len({s.prompt for s in found}) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("custom", '{"prompt": 3}\n', 'needs a "prompt" that is text'),
        ("custom", '{"prompt": "a"}\n', 'needs "output_tokens", a count of 1 or more'),
        ("custom", "{\n", "is not JSON"),
        ("custom", "[1]\n", "must be a JSON mapping"),
        ("custom", "\n", "holds no request that can be used"),
        ("sharegpt", "{}", "must hold a JSON list of conversations"),
        ("sharegpt", '[{"conversations": [1, 2]}]', 'turns must be mappings with "value"'),
        ("sonnet", "\n", "holds no lines of text"),
        ("random", "", "random reads no file; say which kind by --dataset-name"),
    ],
)
def test_broken_files(words, tmp_path, name, text, message):
    path = tmp_path / "file"
    path.write_text(text)
    options = DatasetOptions(dataset_name=name, dataset_path=path, custom_output_len=-1)
    with pytest.raises(ConfigError, match=message) as caught:
        samples(options, words, text=True)
    assert caught.value.field == "--dataset-path"
    assert str(path) in str(caught.value.value)


def test_missing_files(words, tmp_path):
    with pytest.raises(ConfigError, match="--dataset-path = None: custom needs a file"):
        samples(DatasetOptions(dataset_name="custom"), words, text=True)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        samples(DatasetOptions(dataset_name="custom", dataset_path=tmp_path / "no"), words, text=True)
    with pytest.raises(ConfigError, match="--tokenizer = None: sharegpt needs one"):
        samples(DatasetOptions(dataset_name="sharegpt", dataset_path=tmp_path), Words(None), text=True)


def test_a_request_that_does_not_fit_is_refused():
    check_length(0, Sample([], 90, 10), 100)
    with pytest.raises(ConfigError, match=r"request 3 = '91 \+ 10 tokens': exceeds max_model_len \(100\)"):
        check_length(3, Sample([], 91, 10), 100)
