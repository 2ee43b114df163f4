"""The load client against a server that does to each request what the test wants."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from nonet.bench import serve
from nonet.bench.client import Completions, Events
from nonet.bench.datasets import Sample
from nonet.bench.http import Answer, Http, HttpError
from nonet.bench.lag import Lag
from nonet.bench.options import ServeOptions
from nonet.bench.serve import ServeRun
from nonet.errors import ConfigError
from tests.bench.pretend_server import GAP_S, PretendServer, pretend_server


def options(server: PretendServer, **more) -> ServeOptions:
    given = {"port": server.port, "num_prompts": 4, "input_len": 8, "output_len": 3, "disable_tqdm": True}
    return ServeOptions(**{**given, **more})


def bench(more: dict | None = None, key: str | None = None) -> tuple[ServeRun, PretendServer]:
    """A whole run."""

    async def run():
        async with pretend_server() as server:
            return await serve.run(options(server, **(more or {})), key), server

    return asyncio.run(run())


def ask(*prompts: str, count: int = 4, chat: bool = False, timeout: float = 20.0):
    """The outcomes of single requests, one after the other, and the server."""

    async def run():
        async with pretend_server() as server:
            http = Http(f"http://127.0.0.1:{server.port}", {})
            path = "/v1/chat/completions" if chat else "/v1/completions"
            completions = Completions(http, path, chat=chat, model="m", extra={}, timeout=timeout)
            try:
                return [await completions.ask(Sample(prompt, 5, count)) for prompt in prompts], server
            finally:
                await http.close()

    return asyncio.run(run())


def prompts_file(tmp_path, *prompts: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return {"dataset_name": "custom", "dataset_path": path, "disable_shuffle": True, "num_prompts": len(prompts)}


# ---------------------------------------------------------------- one request


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_is_timed(chat):
    """Tokens come GAP_S apart; a chat's role comes at once and is no token."""
    [outcome], _ = ask("slow", chat=chat)
    assert (outcome.error, outcome.text, outcome.prompt_len, outcome.output_len) == ("", " tick" * 4, 7, 4)
    assert outcome.ttft >= GAP_S
    assert len(outcome.itls) == 3
    assert outcome.latency == pytest.approx(outcome.ttft + sum(outcome.itls))
    assert outcome.latency >= 4 * GAP_S


def test_connections_are_used_again():
    outcomes, server = ask("a", "b", "c")
    assert [o.error for o in outcomes] == ["", "", ""]
    assert server.connections == 1


def test_a_kept_connection_that_is_gone_is_replaced():
    outcomes, server = ask("once", "once", "a")
    assert [o.error for o in outcomes] == ["", "", ""]
    assert server.connections == 3


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("refused", "HTTP 400 Whatever: temperature = -1: use 0 or more"),
        ("broken", "HTTP 500 Whatever: no JSON here"),
        ("dropped", "the connection was closed before the answer ended"),
        ("dead", "error in the stream: rank 1 died"),
        ("unfinished", "the stream ended without a finish_reason or [DONE]"),
        ("garbled", "an event is no JSON of a completion: "),
    ],
)
def test_failures_say_what_happened_and_the_next_request_works(prompt, error):
    (failed, fine), _ = ask(prompt, "a")
    assert failed.error.startswith(error)
    assert (fine.error, fine.output_len) == ("", 4)


def test_a_server_that_never_answers():
    (outcome, fine), _ = ask("silent", "a", timeout=0.3)
    assert (outcome.error, fine.error) == ("no end within 0.3 s", "")


def test_no_server():
    async def run():
        http = Http("http://127.0.0.1:1", {})
        completions = Completions(http, "/v1/completions", chat=False, model="m", extra={}, timeout=5)
        return await completions.ask(Sample("a", 1, 1))

    assert asyncio.run(run()).error == "cannot connect to 127.0.0.1:1: Connection refused"


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_events_however_the_bytes_are_cut(cut):
    data = b'data: {"a": 1}\r\n\r\n: comment\n\ndata: x\ndata: y\n\nevent: ping\n\ndata:[DONE]\n\n'

    events = Events()
    found = [event for i in range(0, len(data), cut) for event in events.add(data[i : i + cut])]
    assert found == [b'{"a": 1}', b"x\ny", b"[DONE]"]
    assert events.held == b""


@pytest.mark.parametrize(
    ("headers", "body", "text"),
    [
        ({"transfer-encoding": "chunked"}, b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\n", b"abcde"),
        ({"content-length": "5"}, b"abcde", b"abcde"),
        ({}, b"abcde", b"abcde"),
        ({"transfer-encoding": "chunked"}, b"3\r\nab", None),
        ({"transfer-encoding": "chunked"}, b"zz\r\n", None),
        ({"content-length": "6"}, b"abcde", None),
    ],
)
def test_bodies(headers, body, text):
    async def run():
        class Connection:
            reader = asyncio.StreamReader()

        Connection.reader.feed_data(body)
        Connection.reader.feed_eof()
        return await Answer(200, "", headers, Connection).read()

    if text is None:
        with pytest.raises(HttpError):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == text


# ---------------------------------------------------------------- a run


def test_a_run_asks_for_the_first_model_and_counts_all():
    run, server = bench({"num_prompts": 6, "num_warmups": 2, "save_detailed": True}, key="secret")
    result = run.result
    assert server.paths[0] == "/v1/models"
    assert (len(server.bodies), result["completed"], result["failed"]) == (8, 6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (42, 18)  # as its usage says
    assert result["output_throughput"] == pytest.approx(18 / result["duration"])
    ids = [headers.get("x-request-id", "-") for headers in server.headers[-6:]]
    assert sorted(one.rpartition("-")[2] for one in ids) == [str(i) for i in range(6)]
    assert len({one.rpartition("-")[0] for one in ids}) == 1
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    body = server.bodies[0]
    assert body.pop("prompt")
    assert body == {
        "model": "nonet-tiny", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip
    assert len(result["itls"]) == len(result["generated_texts"]) == 6


def test_the_keys_are_vllms():
    run, _ = bench({"percentile_metrics": "ttft,tpot,itl,e2el", "goodput": ["ttft:10000"]})
    wanted = {
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
        "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
        "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
        "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests", *serve.DETAILS,
        *(f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99")
          for metric in ("ttft", "tpot", "itl", "e2el")),
    }  # fmt: skip
    assert wanted <= set(run.result)
    assert run.result["request_goodput"] == run.result["request_throughput"]
    kept = serve.saved(run.result, detailed=False)
    assert set(run.result) - set(kept) == set(serve.DETAILS)
    json.dumps(run.result, allow_nan=False)


def test_failures_are_counted_and_in_no_figure(tmp_path):
    more = prompts_file(tmp_path, "a", "refused", "dropped", "b") | {"model": "nonet-tiny"}
    run, _ = bench(more)
    assert (run.result["completed"], run.result["failed"]) == (2, 2)
    assert run.result["total_output_tokens"] == 6
    assert run.first_error == "HTTP 400 Whatever: temperature = -1: use 0 or more"
    assert [bool(error) for error in run.result["errors"]] == [False, True, True, False]


@pytest.mark.parametrize(("model", "tokens", "how"), [("nonet-tiny", 3, "by the tokenizer"), ("x", 3, "one an event")])
def test_tokens_that_the_server_does_not_count(tmp_path, model, tokens, how):
    run, _ = bench(prompts_file(tmp_path, "uncounted") | {"model": model})
    assert run.result["output_lens"][0] >= tokens
    assert run.notes[0].startswith(f"the server sent no usage for 1 requests; their output tokens were counted {how}")


def test_chat_and_what_is_sent_with_it():
    more = {
        "backend": "openai-chat", "temperature": 0.5, "top_k": 3, "extra_body": '{"seed": 1, "top_k": 4}',
        "header": ["X-A=b=c"], "base_url": None, "served_model_name": "other", "model": "nonet-tiny", "logprobs": 2,
    }  # fmt: skip
    run, server = bench(more)
    assert (run.result["failed"], run.result["model_id"]) == (0, "nonet-tiny")
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {headers["x-a"] for headers in server.headers} == {"b=c"}
    body = server.bodies[0]
    assert body["messages"][0]["role"] == "user"
    sent = ("model", "temperature", "top_k", "seed", "max_completion_tokens", "logprobs", "top_logprobs")
    assert [body[key] for key in sent] == ["other", 0.5, 4, 1, 3, True, 2]


def test_concurrency_is_bounded_and_waiting_is_no_latency(tmp_path):
    more = prompts_file(tmp_path, *["slow"] * 6) | {"max_concurrency": 2, "model": "nonet-tiny"}
    run, server = bench(more)
    assert server.most_under_way == run.result["max_concurrent_requests"] == 2
    assert run.result["duration"] >= 3 * 3 * GAP_S
    assert max(run.result["queue_times"]) >= 2 * 3 * GAP_S
    for waited, took in zip(run.result["queue_times"], run.result["latencies"], strict=True):
        assert waited + took <= run.result["duration"] + 0.01


def test_requests_leave_at_their_times():
    run, _ = bench({"num_prompts": 10, "request_rate": 25, "burstiness": 1e6})
    starts = run.result["start_times"]
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] >= 9 / 25 / 2
    assert run.result["request_rate"] == 25


def test_the_ready_check_waits_for_the_server_and_gives_up():
    async def run():
        async with pretend_server() as server:
            port = server.port
        given = {"port": port, "num_prompts": 1, "input_len": 4, "output_len": 2, "model": "nonet-tiny"}
        task = asyncio.create_task(serve.run(ServeOptions(**given, ready_check_timeout_sec=20)))
        await asyncio.sleep(0.3)
        async with pretend_server(port):
            found = await task
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="--ready-check-timeout-sec = 0.2: the server is not ready: cannot conn"):
            await serve.run(ServeOptions(**given, ready_check_timeout_sec=0.2))
        assert time.monotonic() - begin < 5
        return found

    assert asyncio.run(run()).result["completed"] == 1


def test_a_client_that_is_too_slow_says_so():
    async def run(block: bool):
        async with Lag() as lag:
            for _ in range(10):
                await asyncio.sleep(0.015)
                if block:
                    time.sleep(0.05)
        return lag

    slow = asyncio.run(run(block=True))
    assert slow.figures()["client_loop_lag_p99_ms"] > 20
    assert "slower than the load: it woke up" in slow.warning([], timed=False)
    slow.ticks, slow.cpu = [0.0], 0.1
    assert slow.warning([], timed=True) is None
    slow.starts = [0.5]
    assert "it sent requests 500.0 ms late (p99)" in slow.warning([0.01], timed=True)
    assert slow.warning([0.01], timed=False) is None
    assert slow.warning([4.0], timed=True) is None  # half a second of a token's four
    slow.cpu = 0.99
    assert "it used 99% of a core" in slow.warning([4.0], timed=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"endpoint": "/v1/chat/completions"}, "speaks chat; use --backend openai-chat"),
        ({"backend": "openai-chat", "endpoint": "/v1/completions"}, "speaks completions; use --backend openai"),
        ({"endpoint": "v1/completions"}, "begins with /, as /v1/completions"),
        ({"base_url": "localhost:8000"}, "--base-url = 'localhost:8000': use http://host:port or https://host:port"),
        ({"base_url": "http://host:port"}, "use http://host:port"),
        ({"header": ["a"]}, "--header = 'a': use KEY=VALUE"),
        ({"header": ["a=b\n"], "metadata": ["=b"]}, "--metadata = '=b': use KEY=VALUE"),
        ({"header": ["a=\u00e9"]}, "headers are printable ASCII"),
        ({"skip_tokenizer_init": True}, "--tokenizer = None: random prompts need one"),
        ({"request_id_prefix": "a\n"}, "use printable ASCII"),
        ({"tokenizer": "nowhere"}, "--tokenizer = 'nowhere': no such folder; give one with tokenizer.json"),
        ({"base_url": "http://127.0.0.1:1"}, r"--model = None: could not be asked of the server \(cannot connect"),
        ({"model": "unknown-here"}, "--tokenizer = None: random prompts need one"),
    ],
)
def test_mistakes(given, message):
    given = {"model": "nonet-tiny", **given} if "127.0.0.1:1" not in given.get("base_url", "") else given
    with pytest.raises(ConfigError, match=message):
        asyncio.run(serve.run(ServeOptions(num_prompts=1, **given)))


def test_the_name_of_the_file(tmp_path):
    result = {"model_id": "org/model", "date": "D"}
    assert serve.result_path(ServeOptions(), result).name == "openai-infqps-model-D.json"
    more = {"request_rate": 2, "max_concurrency": 8, "label": "mine", "result_dir": tmp_path}
    assert serve.result_path(ServeOptions(**more), result) == tmp_path / "mine-2.0qps-concurrency8-model-D.json"
    assert serve.result_path(ServeOptions(result_filename="x.json"), result).name == "x.json"
