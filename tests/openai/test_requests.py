"""Bodies of requests: what is taken, and the one line for what is not."""

from __future__ import annotations

import inspect

import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions

from nonet.errors import RequestError
from nonet.openai.fields import Body, Shown, parse
from nonet.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

HI = [{"role": "user", "content": "hi"}]


def completion(**fields) -> CompletionRequest:
    return parse(CompletionRequest, {"prompt": "a", **fields})


def chat(**fields) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, {"messages": HI, **fields})


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_four_forms_of_a_prompt(given, prompts):
    assert parse(CompletionRequest, {"prompt": given}).prompt == prompts


@pytest.mark.parametrize("given", [None, 3, [], [[]], ["a", 1], [True], [1.5], [["a"]], {"a": 1}])
def test_other_forms_of_a_prompt_are_refused(given):
    with pytest.raises(RequestError, match=r"^prompt = .*must be a text, a list of texts") as raised:
        parse(CompletionRequest, {"prompt": given})
    assert raised.value.field == "prompt"


@pytest.mark.parametrize(
    ("kind", "body", "line"),
    [
        (CompletionRequest, {"max_token": 3}, "max_token = 3: unknown field; did you mean 'max_tokens'?"),
        (CompletionRequest, {}, "prompt = None: is required"),
        (CompletionRequest, {"prompt": "a", "temperature": "1"}, "temperature = '1': must be a valid number"),
        (CompletionRequest, {"prompt": "a", "n": 1.0}, "n = 1.0: must be a valid integer"),
        (CompletionRequest, {"prompt": "a", "stream": 1}, "stream = 1: must be a valid boolean"),
        (
            CompletionRequest,
            {"prompt": "a", "stream": True, "stream_options": {"include_usag": True}},
            "stream_options.include_usag = True: unknown field; did you mean 'include_usage'?",
        ),
        (
            ChatCompletionRequest,
            {"messages": [*HI, {"role": "user", "contnt": "x"}]},
            "messages[1].contnt = 'x': unknown field; did you mean 'content'?",
        ),
        (
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content = [{'type': 'image_url', 'image_url': {}}]: part 'image_url': only text is read; "
            'parts are {"type": "text", "text": "..."}',
        ),
        (
            ChatCompletionRequest,
            {"messages": HI, "response_format": {"type": "xml"}},
            "response_format.type = 'xml': must be 'text', 'json_object' or 'json_schema'",
        ),
        (ChatCompletionRequest, {"messages": HI, "store": True}, "store = True: nothing is stored"),
        (DetokenizeRequest, {"tokens": ["a"]}, "tokens[0] = 'a': must be a valid integer"),
        (DetokenizeRequest, [1], "body = [1]: send a JSON object"),
    ],
)
def test_one_line_names_field_value_and_remedy(kind, body, line):
    with pytest.raises(RequestError) as raised:
        parse(kind, body)
    assert str(raised.value) == line


def test_a_long_value_is_cut():
    with pytest.raises(RequestError) as raised:
        completion(temperature="x" * 100_000)
    assert len(str(raised.value)) < 200
    assert len(repr(Shown(list(range(10_000))))) < 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "b"), ("kv_transfer_params", {"do_remote_decode": True}), ("use_beam_search", True),
        ("bad_words", ["x"]), ("allowed_token_ids", [1]), ("priority", 3), ("length_penalty", 2.0),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as raised:
        completion(**{field: value})
    assert raised.value.field == field
    assert getattr(completion(**{field: None}), field) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("store", False), ("service_tier", "auto"), ("modalities", ["text"]), ("use_beam_search", False), ("priority", 0)],
)
def test_what_asks_for_nothing_is_taken(field, value):
    assert getattr(chat(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("kind", "create"), [(CompletionRequest, Completions.create), (ChatCompletionRequest, Chats.create)]
)
def test_every_parameter_of_the_official_client_is_known(kind, create):
    """Known: taken, or refused for its value by name, never as an unknown field."""
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(create).parameters) - own <= set(kind.model_fields)


def test_stop_is_a_list_whatever_came():
    assert completion().stop == []
    assert completion(stop=None).stop == []
    assert completion(stop="x").stop == ["x"]
    with pytest.raises(RequestError, match="at most 64 texts"):
        completion(stop=["x"] * 65)


def test_biases_are_by_token_id():
    assert completion(logit_bias={"42": -100, "7": 1.5}).logit_bias == {42: -100.0, 7: 1.5}
    for bad in ({"a": 1}, {"-1": 1}, {"1": 101}, {"1": True}, {"1": "2"}, [1], {"9" * 12: 1}):
        with pytest.raises(RequestError, match="logit_bias"):
            completion(logit_bias=bad)


def test_parts_of_type_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


def test_a_message_that_a_client_sends_back_is_taken():
    """As the official client dumps an answer: with empty extras."""
    back = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": None,
    }  # fmt: skip
    assert chat(messages=[*HI, back, *HI]).messages[1].content == "x"


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_null_is_like_leaving_out(kind: type[Body]):
    """Clients send null for what they do not set."""
    required = {"prompt": "a", "messages": HI, "tokens": [1]}
    body = {name: None for name, field in kind.model_fields.items() if field.default is None}
    body.update({name: value for name, value in required.items() if name in kind.model_fields})
    assert parse(kind, body)
