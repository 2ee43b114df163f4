"""A server on nonet-tiny over two ranks, driven by OpenAI's own client, and by httpx where that is in the way."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import openai
import pytest

from tests.server.live import Live, live

PROMPT = "The Lord is my shepherd; I shall"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server():
    with live(data_parallel_size=2, num_blocks=512, max_request_bytes=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: Live):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def alone(client) -> str:
    """What greedy decoding goes on with."""
    return client.completions.create(model="nonet-tiny", prompt=PROMPT, **GREEDY).choices[0].text


def test_streamed_text_is_the_whole(client, alone):
    stream = client.completions.create(model="nonet-tiny", prompt=PROMPT, stream=True, **GREEDY)
    chunks = list(stream)
    assert len(alone) > 10
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_and_token_ids_are_one_prompt(client, http, alone):
    tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert client.completions.create(model="nonet-tiny", prompt=tokens, **GREEDY).choices[0].text == alone


def test_many_prompts_and_n(client, alone):
    prompts = [PROMPT, "import os\n", PROMPT]
    whole = client.completions.create(model="nonet-tiny", prompt=prompts, n=2, **GREEDY)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert texts[0] == texts[1] == texts[4] == texts[5] == alone
    assert texts[2] == texts[3] != alone
    streamed = [""] * 6
    usage = None
    for chunk in client.completions.create(
        model="nonet-tiny", prompt=prompts, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert usage == whole.usage or usage.completion_tokens == whole.usage.completion_tokens == 72


def test_seeded_samples_differ_within_n_and_repeat(client):
    ask = lambda: client.completions.create(  # noqa: E731
        model="nonet-tiny", prompt=PROMPT, n=3, seed=5, temperature=1.0, max_tokens=8
    )
    first, second = ([choice.text for choice in ask().choices] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_stop_and_its_reason(client, alone):
    word = alone.split()[1]
    choice = client.completions.create(model="nonet-tiny", prompt=PROMPT, stop=[word], **GREEDY).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == alone[: alone.index(word)]
    assert choice.model_extra["stop_reason"] == word
    extra = {"include_stop_str_in_output": True}
    kept = client.completions.create(model="nonet-tiny", prompt=PROMPT, stop=word, extra_body=extra, **GREEDY)
    assert kept.choices[0].text == alone[: alone.index(word) + len(word)]


def test_chat_whole_and_streamed(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]
    whole = client.chat.completions.create(
        model="nonet-tiny", messages=messages, logprobs=True, top_logprobs=3, temperature=0, max_completion_tokens=10
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert whole.usage.completion_tokens == len(choice.logprobs.content)
    assert bytes(b for entry in choice.logprobs.content for b in entry.bytes).decode() == choice.message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in choice.logprobs.content)  # greedy
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    stream = client.chat.completions.create(
        model="nonet-tiny", messages=messages, temperature=0, max_completion_tokens=10, stream=True
    )
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == choice.message.content


def test_going_on_with_the_last_message(http):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the beginning "}]
    body = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nIn the beginning ")
    found = http.post("/v1/chat/completions", json={**body, **GREEDY, "stop": None}).json()
    assert found["usage"]["prompt_tokens"] == len(tokens)


def test_echo_scores_are_the_models(client):
    """The scores of an echoed greedy output are those it was drawn with."""
    drawn = client.completions.create(model="nonet-tiny", prompt=PROMPT, logprobs=1, **GREEDY)
    tokens = drawn.choices[0].logprobs.tokens
    scored = client.completions.create(
        model="nonet-tiny", prompt=PROMPT + "".join(tokens), echo=True, logprobs=1, max_tokens=0
    )
    assert scored.choices[0].text == PROMPT + "".join(tokens)
    assert scored.choices[0].logprobs.tokens[-len(tokens) :] == tokens
    again = scored.choices[0].logprobs.token_logprobs[-len(tokens) :]
    assert again == pytest.approx(drawn.choices[0].logprobs.token_logprobs, abs=1e-3)


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}},
                                         "required": ["a"], "additionalProperties": False}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"],
            "additionalProperties": False}}}},
    ],
)  # fmt: skip
def test_structured_outputs_match(http, extra):
    body = {"prompt": PROMPT, "n": 4, "seed": 1, "temperature": 1.5, "max_tokens": 200, **extra}
    for choice in http.post("/v1/completions", json=body).json()["choices"]:
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["text"])) == {"a"}
        else:
            assert choice["text"].lstrip().startswith("{")


def test_structured_choices_and_patterns(http):
    body = {"prompt": PROMPT, "n": 8, "seed": 1, "temperature": 2, "max_tokens": 50}
    found = http.post("/v1/completions", json={**body, "guided_choice": ["red", "green"]}).json()["choices"]
    assert {choice["text"] for choice in found} <= {"red", "green"}
    found = http.post("/v1/completions", json={**body, "guided_regex": "[0-9]{3}-[a-f]{2}"}).json()["choices"]
    assert all(len(choice["text"]) == 6 and choice["text"][3] == "-" for choice in found)
    refused = http.post("/v1/completions", json={**body, "guided_regex": "[0-9"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "structured_outputs.regex"


def test_biases_are_added(http):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 3, "return_token_ids": True, "logit_bias": {"42": 100}}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"] == [42] * 3


def test_errors_have_the_classes_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="nonet-tiny", prompt="a", temperature=-1)
    assert raised.value.param == "temperature"
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])
    assert missing.value.code == "model_not_found"


def test_a_pinned_rank_serves(http, server):
    before = [s.tokens for s in server.llm.client.stats()]
    for _ in range(3):
        http.post("/v1/completions", json={"prompt": "a b c", **GREEDY}, headers={"X-data-parallel-rank": "1"})
    after = [s.tokens for s in server.llm.client.stats()]
    assert after[0] == before[0]
    assert after[1] > before[1]


def send(server: Live, head: str, body: bytes = b"") -> bytes:
    """Bytes over a plain socket; what comes back until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        plain.sendall(head.encode() + b"\r\n" + body)
        found = b""
        while part := plain.recv(65536):
            found += part
        return found


def test_a_body_that_is_too_large_is_not_read(server):
    """Announced: refused before a byte of it is sent. Not announced: refused when it has grown too large."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000000\r\nExpect: 100-continue\r\n"
    began = time.monotonic()
    found = send(server, head)
    assert found.startswith(b"HTTP/1.1 413")
    assert b"max_request_bytes" in found
    assert time.monotonic() - began < 10
    chunk = b"%x\r\n%b\r\n" % (50_000, b" " * 50_000)
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    assert send(server, head, chunk * 3 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")


BAD = [
    ("/v1/completions", b"{", 400, "body", "send valid JSON"),
    ("/v1/completions", b'{"prompt": NaN}', 400, "body", "send valid JSON"),
    ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}', 400, "body", "out of range"),
    ("/v1/completions", b"\xff\xfe", 400, "body", "send valid JSON"),
    ("/v1/completions", b"[" * 50_000, 400, "body", "nested too deeply"),
    ("/v1/completions", b'"text"', 400, "body", "send a JSON object"),
    ("/v1/completions", b'{"prompt": "\\ud800 x"}', 400, "body", "JSON"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt", "at least one token"),
    ("/v1/completions", {"prompt": [8192]}, 400, "prompt_token_ids", "0 to 8191"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt_token_ids", "0 to 8191"),
    ("/v1/completions", {"prompt": [10**30]}, 400, "prompt_token_ids", "0 to 8191"),
    ("/v1/completions", {"prompt": [5] * 2048}, 400, "prompt", "shorter than"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "1 or more"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2048}, 400, "max_tokens", "at most"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", "64 bits"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "max_tokens"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n", "1 or more"),
    ("/v1/completions", {"prompt": "a", "n": 5000}, 400, "n", "at most 4096"),
    ("/v1/completions", {"prompt": ["a"] * 5000}, 400, "prompt", "at most 4096"),
    ("/v1/completions", {"prompt": "a", "temperature": 101}, 400, "temperature", "0 (greedy) to 100"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p", "(0, 1]"),
    ("/v1/completions", {"prompt": "a", "top_k": -2}, 400, "top_k", "-1 or 0"),
    ("/v1/completions", {"prompt": "a", "seed": 2**63}, 400, "seed", "64 bits"),
    ("/v1/completions", {"prompt": "a", "logprobs": 101}, 400, "logprobs", "0 to 100"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop", "non-empty"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"8192": 1}}, 400, "logit_bias", "0 to 8191"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of", "not supported"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "temprature", "'temperature'"),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options", "stream = true"),
    ("/v1/completions", {"prompt": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "1 or more"),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice", "one of"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {}}, 400, "structured_outputs", "exactly one"),
    ("/v1/completions", {"prompt": "a", "request_id": "\n"}, 400, "request_id", "printable"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0].role", "required"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": []}]}, 400, "messages", "template"),
    ("/v1/chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "logprobs = true"),
    ("/v1/chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", "tool_choice 'none'"),
    ("/v1/chat/completions", {"chat_template": "{{ 1 }}"}, 400, "chat_template", "chat_template_kwargs"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": 1}}, 400, "chat_template_kwargs.messages", "itself"),
    ("/v1/chat/completions", {"continue_final_message": True}, 400, "continue_final_message", "add_generation_prompt"),
    ("/v1/chat/completions", {"max_completion_tokens": 0}, 400, "max_completion_tokens", "1 or more"),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema"}}, 400,
     "response_format.json_schema.schema", "is required"),
    ("/v1/nothing", {}, 404, None, "no such route"),
    ("/health", {}, 405, None, "does not take POST"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "remedy"), BAD)
def test_a_bad_request_gets_one_line_and_the_server_lives(http, path, body, status, param, remedy):
    if isinstance(body, dict) and path.endswith("chat/completions"):
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == param
    assert remedy in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert http.get("/health").json() == {"status": "ok"}


def test_other_mistakes_of_http(http):
    assert http.post("/v1/completions", data={"prompt": "a"}).status_code == 415
    long = http.get("/health", headers={"X-Request-Id": "x" * 300})
    assert long.status_code == 400
    assert long.json()["error"]["param"] == "X-Request-Id"


def test_a_closed_connection_ends_its_requests(server, http):
    """Whole or streamed, one sequence or many, running or waiting."""
    many = {"prompt": ["a", "b", "c"], "n": 60, "max_tokens": 1500, "ignore_eos": True}
    for body in ({**many, "stream": True}, many):
        with httpx.Client(base_url=server.url, timeout=1.0) as impatient:
            if body.get("stream"):
                with impatient.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    impatient.post("/v1/completions", json=body)
        assert server.all_free()
    assert http.post("/v1/completions", json={"prompt": "a", **GREEDY}).status_code == 200


def test_running_and_waiting_sequences_by_engine(server, http):
    """128 sequences run at a time. When all have ended, none is counted."""

    def counted() -> dict[str, float]:
        page = http.get("/metrics").text
        found = re.findall(r'^vllm:num_requests_(\w+)\{engine="(\d)".*\} (.*)$', page, re.MULTILINE)
        return {f"{what} {engine}": float(value) for what, engine, value in found}

    body = {"prompt": "a", "n": 130, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=server.url, timeout=60, headers={"X-data-parallel-rank": "1"}) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: the connection ends with it
            next(lines)
            during = counted()
    assert during["running 1"] + during["waiting 1"] == 130
    assert 2 <= during["waiting 1"] < 130
    assert during["running 0"] == during["waiting 0"] == 0
    assert server.all_free()
    assert not any(counted().values())


def test_equal_ids_do_not_collide(server):
    headers = {"X-Request-Id": "same"}
    body = {"prompt": "a b", "stream": True, "max_tokens": 30, "ignore_eos": True}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as one:
            with client.stream("POST", "/v1/completions", json=body) as other:
                texts = [list(each.iter_lines()) for each in (one, other)]
    assert all(lines[-2] == "data: [DONE]" for lines in texts)
    assert all('"id":"cmpl-same"' in lines[0] for lines in texts)
