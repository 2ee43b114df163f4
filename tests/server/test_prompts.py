"""From bodies to what the engine takes: parameters, defaults, limits."""

from __future__ import annotations

import asyncio
import json

import pytest

from nonet.engine.tokenizer import Tokenizer
from nonet.errors import RequestError
from nonet.openai.fields import parse
from nonet.openai.requests import ChatCompletionRequest, CompletionRequest
from nonet.server.prompts import (
    Encoder,
    Limits,
    PromptTokens,
    check_count,
    checkpoint_defaults,
    sampling_params,
    settle_length,
    truncated,
)
from nonet.types import SamplingParams, StructuredOutputsParams
from tests.server.pretend_llm import PretendLLM


def completion(defaults=None, **fields) -> SamplingParams:
    return sampling_params(parse(CompletionRequest, {"prompt": "a", **fields}), defaults or {})


def chat(**fields) -> SamplingParams:
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    return sampling_params(parse(ChatCompletionRequest, body), {})


def test_defaults_are_openais():
    assert completion() == SamplingParams(max_tokens=16)
    assert chat() == SamplingParams(max_tokens=None)


def test_fields_arrive():
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.0, "seed": 3,
        "frequency_penalty": -1.0, "repetition_penalty": 1.1, "max_tokens": 9, "min_tokens": 2, "stop": ["x"],
        "stop_token_ids": [4], "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
        "prompt_logprobs": 1, "logprobs": 2,
    }  # fmt: skip
    assert completion(**fields, logit_bias={"3": 1}) == SamplingParams(**fields, logit_bias={3: 1.0})
    assert chat(logprobs=True, top_logprobs=4).logprobs == 4
    assert chat(logprobs=True).logprobs == 0
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5


def test_the_checkpoints_defaults_give_way_to_the_request(tmp_path):
    found = {"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": 3, "top_p": "x"}
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    defaults = checkpoint_defaults(str(tmp_path))
    assert defaults == {"temperature": 0.6, "top_k": 20}
    assert completion(defaults, temperature=0).temperature == 0
    assert completion(defaults).top_k == 20
    (tmp_path / "generation_config.json").write_text("[")
    assert checkpoint_defaults(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": "{}"}}, {"json": "{}"}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}},
            {"json": {"type": "string"}},
        ),
    ],
)
def test_structured_outputs_by_any_name(fields, wanted):
    assert completion(**fields).structured_outputs == StructuredOutputsParams(**wanted)
    assert completion(response_format={"type": "text"}).structured_outputs is None


def test_two_grammars_cannot_both_hold():
    with pytest.raises(RequestError, match="guided_regex = 'given': cannot go with response_format"):
        completion(response_format={"type": "json_object"}, guided_regex="a")
    with pytest.raises(RequestError, match="exactly one of json, regex"):
        completion(structured_outputs={"regex": "a", "choice": ["b"]})
    with pytest.raises(RequestError, match="min_tokens = 2: use 0 with structured_outputs"):
        completion(min_tokens=2, guided_regex="a")


def test_lengths_are_settled_for_each_prompt():
    limits = Limits(100, 60)
    params = SamplingParams(max_tokens=None)
    assert settle_length(params, PromptTokens([1] * 20, None), limits).max_tokens == 40
    asked = SamplingParams(max_tokens=40)
    assert settle_length(asked, PromptTokens([1] * 20, None), limits) is asked
    with pytest.raises(RequestError, match="max_tokens = 40: with a prompt of 21 tokens it exceeds 60; use at most 39"):
        settle_length(asked, PromptTokens([1] * 21, None), limits)
    with pytest.raises(RequestError, match=r"must be shorter than the KV cache \(60\)"):
        settle_length(params, PromptTokens([1] * 60, None), limits)
    with pytest.raises(RequestError, match=r"must be shorter than max_model_len \(50\)"):
        settle_length(params, PromptTokens([1] * 60, None), Limits(50, 60))


def test_prompts_are_truncated_from_the_left():
    limits = Limits(10, None)
    prompts = [PromptTokens([1, 2, 3], "abc"), PromptTokens(list(range(20)), "long")]
    assert truncated(prompts, None, None, limits) == prompts
    assert truncated(prompts, 2, None, limits) == [PromptTokens([2, 3], None), PromptTokens([18, 19], None)]
    assert truncated(prompts, -1, 4, limits) == [prompts[0], PromptTokens(list(range(14, 20)), None)]


def test_many_sequences_are_refused():
    check_count(4096, 1)
    with pytest.raises(RequestError, match="n = 4097: at most 4096 sequences"):
        check_count(1, 4097)
    with pytest.raises(RequestError, match="prompt = '64 prompts x n = 65'"):
        check_count(64, 65)


def test_long_texts_are_tokenized_beside_the_event_loop():
    tokenizer = PretendLLM().tokenizer
    encoder = Encoder(tokenizer)
    text = "hello world " * 5000

    async def run() -> int:
        turns = 0
        task = asyncio.create_task(encoder.encode(text))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        assert task.result() == tokenizer.encode(text)
        return turns

    assert asyncio.run(run()) > 3


def test_without_a_tokenizer_only_token_ids(tmp_path):
    encoder = Encoder(Tokenizer(str(tmp_path)))
    with pytest.raises(RequestError, match="has no tokenizer.json; give prompt_token_ids"):
        asyncio.run(encoder.encode("a", special=False))
