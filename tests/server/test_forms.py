"""Responses in OpenAI's form, whole and streamed, over a pretend engine."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from nonet.errors import CapacityError, EngineDeadError
from nonet.server.app import create_app
from tests.server.pretend_llm import PretendLLM

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def ask(llm: PretendLLM, path: str, body: dict | None = None, headers: dict | None = None) -> httpx.Response:
    """One request straight into the application."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            if body is None:
                return await client.get(path, headers=headers)
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(run())


def events(response: httpx.Response) -> list[dict]:
    """The JSON of every event; the last event must be [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_a_completion():
    found = ask(PretendLLM(), "/v1/completions", {"prompt": "a", "max_tokens": 5}, {"X-Request-Id": "mine"}).json()
    Completion.model_validate(found)
    assert found["id"] == "cmpl-mine"
    assert found["model"] == "nonet-tiny"
    assert found["object"] == "text_completion"
    assert found["usage"] == {
        "prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    (choice,) = found["choices"]
    assert choice == {
        "index": 0, "text": PretendLLM().tokenizer.decode([67, 302, 370]), "logprobs": None, "finish_reason": "stop",
        "stop_reason": None,
    }  # fmt: skip


def test_a_streamed_completion_has_a_chunk_a_token():
    llm = PretendLLM()
    found = events(ask(llm, "/v1/completions", {"prompt": "a", "stream": True}))
    assert [len(chunk["choices"]) for chunk in found] == [1, 1, 1]
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == llm.tokenizer.decode(llm.tokens)
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, None, "stop"]
    assert len({chunk["id"] for chunk in found}) == 1
    assert all("usage" not in chunk for chunk in found)


def test_usage_of_a_stream_comes_last_and_null_before():
    body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    found = events(ask(PretendLLM(), "/v1/completions", body))
    assert [chunk["usage"] for chunk in found[:-1]] == [None] * 3
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["total_tokens"] == 4


def test_usage_so_far_in_every_chunk():
    body = {**HI, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    found = events(ask(PretendLLM(), CHAT, body))
    assert [chunk["usage"]["completion_tokens"] for chunk in found] == [1, 1, 2, 3, 3]


def test_prompts_times_n_are_choices_in_order():
    llm = PretendLLM()
    body = {"prompt": ["a", "b b"], "n": 2, "return_token_ids": True}
    found = ask(llm, "/v1/completions", body).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in found["choices"]] == [[67]] * 2 + [llm.tokenizer.encode("b b")] * 2
    assert {tuple(choice["token_ids"]) for choice in found["choices"]} == {(67, 302, 370)}
    assert found["usage"]["completion_tokens"] == 12
    assert len({name for _, _, name, _ in llm.seen}) == 2


def test_streams_of_prompts_times_n_bear_their_index():
    found = events(ask(PretendLLM(), "/v1/completions", {"prompt": ["a", "b b"], "n": 2, "stream": True}))
    texts = dict.fromkeys(range(4), "")
    for chunk in found:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert set(texts.values()) == {PretendLLM().tokenizer.decode([67, 302, 370])}


def test_logprobs_of_completions():
    llm = PretendLLM()
    found = ask(llm, "/v1/completions", {"prompt": "a", "logprobs": 2}).json()["choices"][0]["logprobs"]
    words = [llm.tokenizer.decode([token]) for token in llm.tokens]
    assert found["tokens"] == words
    assert found["token_logprobs"] == [-2.5] * 3
    assert found["text_offset"] == [0, len(words[0]), len(words[0] + words[1])]
    assert found["top_logprobs"][0] == {words[0]: -2.5, "<|endoftext|>": -0.5, "<|im_start|>": -1.0}


def test_logprobs_as_token_ids():
    body = {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True}
    found = ask(PretendLLM(), "/v1/completions", body).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["token_id:67", "token_id:302", "token_id:370"]
    assert set(found["top_logprobs"][1]) == {"token_id:302", "token_id:0"}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_first(stream):
    llm = PretendLLM()
    body = {"prompt": "hello world", "echo": True, "logprobs": 1, "max_tokens": 2, "stream": stream}
    response = ask(llm, "/v1/completions", body)
    chunks = events(response) if stream else [response.json()]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello world" + llm.tokenizer.decode([67, 302])
    tokens = [token for c in chunks for token in c["choices"][0]["logprobs"]["tokens"]]
    values = [value for c in chunks for value in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert "".join(tokens) == "hello world" + llm.tokenizer.decode([67, 302])
    assert values == [None, *[-2.5] * (len(tokens) - 1)]


def test_echo_of_no_tokens_scores_the_prompt():
    llm = PretendLLM()
    body = {"prompt": [67, 302], "echo": True, "logprobs": 0, "max_tokens": 0}
    found = ask(llm, "/v1/completions", body).json()
    assert found["choices"][0]["text"] == llm.tokenizer.decode([67, 302])
    assert found["choices"][0]["logprobs"]["token_logprobs"] == [None, -2.5]
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_vllms():
    found = ask(PretendLLM(), "/v1/completions", {"prompt": [67, 302], "prompt_logprobs": 1}).json()
    first, second = found["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["302"]["logprob"] == -2.5
    assert second["0"] == {"logprob": -0.5, "rank": 1, "decoded_token": "<|endoftext|>"}


def test_a_chat():
    llm = PretendLLM()
    found = ask(llm, CHAT, {**HI, "max_completion_tokens": 3, "n": 2}).json()
    ChatCompletion.model_validate(found)
    assert [choice["message"]["role"] for choice in found["choices"]] == ["assistant"] * 2
    assert found["choices"][1]["message"]["content"] == llm.tokenizer.decode(llm.tokens)
    assert found["choices"][1]["finish_reason"] == "length"
    assert llm.tokenizer.decode(llm.seen[0][0], False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_streamed_chat_names_the_role_first():
    found = events(ask(PretendLLM(), CHAT, {**HI, "stream": True, "n": 2}))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    own = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["index"] == 1]
    assert own[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in own[1:])
    assert [choice["finish_reason"] for choice in own] == [None, None, None, "stop"]


def test_logprobs_of_a_chat_have_bytes():
    llm = PretendLLM(tokens=llm_bytes())
    body = {**HI, "logprobs": True, "top_logprobs": 2}
    content = ask(llm, CHAT, body).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "a\u00fc\u6f22"
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5, -1.0]
    without = ask(llm, CHAT, {**HI, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in without] == [[]] * len(content)


def llm_bytes() -> list[int]:
    """A text whose characters may be divided over tokens."""
    return PretendLLM().tokenizer.encode("a\u00fc\u6f22")


def test_an_error_before_the_first_token_has_its_status():
    for stream in (False, True):
        llm = PretendLLM()
        llm.error = CapacityError("no room now")
        response = ask(llm, "/v1/completions", {"prompt": "a", "stream": stream})
        assert response.status_code == 503
        assert response.json()["error"] == {
            "message": "no room now", "type": "service_unavailable", "param": None, "code": "unavailable",
        }  # fmt: skip


def test_an_error_half_way_is_the_last_event():
    llm = PretendLLM()
    llm.error, llm.error_at = EngineDeadError("rank 1 died (SIGKILL)"), 2
    response = ask(llm, "/v1/completions", {"prompt": ["a", "b"], "stream": True})
    assert response.status_code == 200
    parts = [part.removeprefix("data: ") for part in response.text.strip().split("\n\n")]
    assert json.loads(parts[-1])["error"]["message"] == "rank 1 died (SIGKILL)"
    assert "[DONE]" not in response.text
    assert len(llm.aborted) == 2


def test_a_defect_is_a_500_without_details(caplog):
    llm = PretendLLM()
    llm.error = ZeroDivisionError("secret")
    for stream, at in ((False, 0), (True, 1)):
        llm.error_at = at
        response = ask(llm, "/v1/completions", {"prompt": "a", "stream": stream})
        assert "internal error; the server's log has the details" in response.text
        assert "secret" not in response.text
        assert response.status_code == (200 if stream else 500)
    assert "ZeroDivisionError" in caplog.text


def test_pinned_rank_and_ids_reach_the_engine():
    llm = PretendLLM()
    headers = {"X-Request-Id": "a#b", "X-data-parallel-rank": "1"}
    names = []
    for _ in range(2):
        response = ask(llm, "/v1/completions", {"prompt": "a"}, headers)
        assert response.headers["x-request-id"] == "a#b"
        names.append(llm.seen[-1][2])
        assert llm.seen[-1][3] == 1
    assert all(name.startswith("a-b-0-") for name in names)
    assert len(set(names)) == 2
    response = ask(llm, "/v1/completions", {"prompt": "a", "request_id": "from-the-body"})
    assert response.headers["x-request-id"] == "from-the-body"
    assert response.json()["id"] == "cmpl-from-the-body"


@pytest.mark.parametrize("rank", ["2", "-1", "x", "", "1.0", "9" * 30, "\u0663".encode()])
def test_a_rank_that_is_not_there(rank):
    response = ask(PretendLLM(), "/v1/completions", {"prompt": "a"}, {"X-data-parallel-rank": rank})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-data-parallel-rank"
    assert "ranks are 0 to 1" in response.json()["error"]["message"]


def test_metrics_add_up():
    llm = PretendLLM()

    async def run() -> tuple[str, str]:
        app = create_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            await client.post("/v1/completions", json={"prompt": ["a", "b b"], "max_tokens": 3})
            await client.post(CHAT, json={**HI, "stream": True})
            routes = app.state.routes
            routes.peers = type("Peers", (), {"rows": lambda self: asyncio.sleep(0, [routes.metrics.row()])})()
            twice = (await client.get("/metrics")).text
            routes.peers = None
            return (await client.get("/metrics")).text, twice

    page, twice = asyncio.run(run())
    own = '{model_name="nonet-tiny"}'
    for line in (
        f"vllm:generation_tokens_total{own} 9.0",
        'vllm:num_requests_running{engine="0",model_name="nonet-tiny"} 1.0',
        'vllm:num_requests_running{engine="1",model_name="nonet-tiny"} 2.0',
        'vllm:num_requests_waiting{engine="1",model_name="nonet-tiny"} 2.0',
        'vllm:request_success_total{finished_reason="length",model_name="nonet-tiny"} 2.0',
        'vllm:request_success_total{finished_reason="stop",model_name="nonet-tiny"} 1.0',
        f"vllm:time_to_first_token_seconds_count{own} 2.0",
        f"vllm:e2e_request_latency_seconds_count{own} 2.0",
        f"vllm:inter_token_latency_seconds_count{own} 6.0",
        f"vllm:request_generation_tokens_sum{own} 9.0",
        'vllm:kv_cache_usage_perc{engine="1",model_name="nonet-tiny"} 0.25',
        'vllm:num_preemptions_total{engine="1",model_name="nonet-tiny"} 1.0',
        'nonet:tokens_total{engine="1",model_name="nonet-tiny"} 41.0',
    ):
        assert line in page.splitlines()
    assert f"vllm:generation_tokens_total{own} 18.0" in twice.splitlines()


def test_expert_load_by_rank_where_experts_are_whole():
    page = ask(PretendLLM(enable_expert_parallel=True), "/metrics").text.splitlines()
    assert 'nonet:expert_tokens_total{layer="4",model_name="nonet-tiny",rank="1"} 32.0' in page
    assert 'nonet:expert_imbalance{layer="0",model_name="nonet-tiny"} 0.0' in page
    assert "expert_tokens" not in ask(PretendLLM(), "/metrics").text


def test_health_and_new_requests_when_the_engine_is_dead():
    llm = PretendLLM()
    assert ask(llm, "/health").json() == {"status": "ok"}
    llm.dead = EngineDeadError("rank 1 died (SIGKILL)")
    for response in (ask(llm, "/health"), ask(llm, "/v1/completions", {"prompt": "a"}), ask(llm, CHAT, HI)):
        assert response.status_code == 503
        assert "rank 1 died" in response.json()["error"]["message"]
    assert ask(llm, "/metrics").status_code == 200


def test_models_and_names():
    llm = PretendLLM(served_model_name=["big", "org/small"])
    assert [card["id"] for card in ask(llm, "/v1/models").json()["data"]] == ["big", "org/small"]
    assert ask(llm, "/v1/models/org/small").json()["id"] == "org/small"
    assert ask(llm, "/v1/completions", {"prompt": "a"}).json()["model"] == "big"
    assert ask(llm, "/v1/completions", {"prompt": "a", "model": "org/small"}).json()["model"] == "org/small"
    for response in (
        ask(llm, "/v1/models/nonet-tiny"),
        ask(llm, "/v1/completions", {"prompt": "a", "model": "nonet-tiny"}),
        ask(llm, "/tokenize", {"prompt": "a", "model": "nonet-tiny"}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "served: big, org/small" in response.json()["error"]["message"]
    assert [card["id"] for card in ask(PretendLLM(), "/v1/models").json()["data"]] == ["nonet-tiny"]


def test_a_requests_template_is_run_only_if_clients_are_trusted():
    body = {**HI, "chat_template": "{{ messages[0].content }}, is it?"}
    response = ask(PretendLLM(), CHAT, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "chat_template"
    llm = PretendLLM(trust_request_chat_template=True)
    assert ask(llm, CHAT, body).status_code == 200
    assert llm.tokenizer.decode(llm.seen[0][0], False) == "hi, is it?"


def test_a_key_guards_v1_only():
    llm = PretendLLM(api_key=["first", "second"])
    assert ask(llm, "/health").status_code == 200
    for value in (None, "Bearer third", "Bearer ", "second", "Basic second"):
        response = ask(llm, "/v1/models", headers={"Authorization": value} if value else {})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "x-request-id" in response.headers
    for value in ("Bearer first", "bearer second"):
        assert ask(llm, "/v1/models", headers={"Authorization": value}).status_code == 200


def test_tokenize_and_back():
    llm = PretendLLM()
    found = ask(llm, "/tokenize", {"prompt": "hello world", "return_token_strs": True}).json()
    assert found == {
        "count": 3, "max_model_len": 2048, "tokens": llm.tokenizer.encode("hello world"),
        "token_strs": ["hel", "lo", "\u0120world"],
    }  # fmt: skip
    assert ask(llm, "/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hello world"}
    chat = ask(llm, "/tokenize", {**HI, "add_generation_prompt": False}).json()
    assert llm.tokenizer.decode(chat["tokens"], False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert ask(llm, "/tokenize", {**HI, "prompt": "a"}).status_code == 400
    assert ask(llm, "/tokenize", {}).status_code == 400
    assert ask(llm, "/detokenize", {"tokens": [8192]}).status_code == 400
