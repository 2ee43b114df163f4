"""The way of a token from the engine to a client without a task: the same events in the same order, never one twice."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from nonet.engine import client as client_module
from nonet.engine import front_end
from nonet.engine import messages as m
from nonet.engine.llm import AsyncLLM
from nonet.errors import EngineDeadError
from nonet.server.app import create_app
from nonet.server.http import DIRECT_SEND
from nonet.server.sse import EventStream
from nonet.types import RequestOutput, SamplingParams
from tests.engine.pretend_ranks import PretendNode
from tests.server.pretend_llm import PretendLLM

NAME = m.sequence_name(0, 0)
TOKENS = [67, 302, 370]


class LongWay(PretendLLM):
    """An engine that never offers the short cut."""

    def stream(self, *args, grown=None, **more):
        return super().stream(*args, **more)


def streamed(llm: PretendLLM, path: str, body: dict) -> list[dict]:
    """The events of a stream, without ids and times."""

    async def run() -> str:
        transport = httpx.ASGITransport(create_app(llm))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.post(path, json={"stream": True, **body})).text

    parts = asyncio.run(run()).split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    found = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
    return [{key: value for key, value in event.items() if key not in ("id", "created")} for event in found]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"n": 2},
        {"return_token_ids": True},
        {"logprobs": 1},
        {"echo": True},
    ],
)
def test_its_events_are_those_of_the_long_way(path, body):
    chat = path.endswith("chat/completions")
    body = {"max_tokens": 9, **body, **({"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "a"})}
    if chat:
        body = {key: value for key, value in body.items() if key not in ("echo", "logprobs")}
    tokens = [67, 302, 370, 67, 67, 300, 301]
    short, long = PretendLLM(tokens), LongWay(tokens)
    assert streamed(short, path, body) == streamed(long, path, body)


def test_what_waits_for_a_slow_client_is_written_once_by_the_long_way():
    """A send that would wait is given up before it wrote; the next event of the iterator has the text."""
    written: list[bytes] = []
    free, asked = asyncio.Event(), asyncio.Event()

    async def send(message) -> None:
        await free.wait() if not free.is_set() else None
        written.append(message.get("body", b""))

    async def receive():
        await asyncio.sleep(100)

    async def events():
        await asked.wait()
        yield b"long"

    async def run() -> None:
        stream = EventStream(b"first", events())
        assert not stream.write_now(b"too early")
        free.set()
        task = asyncio.create_task(stream({DIRECT_SEND: send}, receive, send))
        while b"first" not in written:
            await asyncio.sleep(0)
        assert stream.write_now(b"short")
        free.clear()
        assert not stream.write_now(b"given up")
        free.set()
        asked.set()
        await task
        assert not stream.write_now(b"too late")

    asyncio.run(run())
    assert written == [b"", b"first", b"short", b"long", b""]


@pytest.fixture
def engine(monkeypatch):
    """AsyncLLM over a pretend rank."""
    monkeypatch.setattr(client_module, "Node", PretendNode)
    monkeypatch.setattr(front_end, "_POLL_MS", 5)
    llm = AsyncLLM("nonet-tiny", device="cpu")
    yield llm
    llm.close()


def say(*tokens: int, reason: str | None = None) -> None:
    PretendNode.latest.say(m.Chunks(0, [m.Chunk(NAME, [token], finish_reason=reason) for token in tokens]))


async def through(llm: AsyncLLM, grown, **params) -> list[RequestOutput]:
    """A stream's outputs. The rank says a token, which `grown` does not see, and one more when its output came."""
    outs = []

    def after_first(output) -> bool:
        return bool(outs) and grown(output)

    stream = llm.stream([5], SamplingParams(max_tokens=50, **params), grown=after_first)
    turn = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    say(TOKENS[0])
    outs.append(await asyncio.wait_for(turn, 5))
    say(TOKENS[1])
    async with asyncio.timeout(5):
        async for out in stream:
            outs.append(out)  # noqa: PERF401 - some of it is kept where the stream raises
    return outs


def test_the_iteration_sees_the_first_and_the_last(engine):
    texts = []

    def grown(output) -> bool:
        texts.append(output.text)
        say(TOKENS[2], reason="length")
        return True

    outs = asyncio.run(through(engine, grown))
    decode = engine.tokenizer.decode
    assert texts == [decode(TOKENS[:2])]
    assert [out.outputs[0].text for out in outs] == [decode(TOKENS[:1]), decode(TOKENS)]
    assert outs[-1].finished
    assert outs[-1].outputs[0].token_ids == TOKENS


def test_what_is_not_taken_goes_the_long_way(engine):
    def grown(output) -> bool:
        say(TOKENS[2], reason="length")
        return False

    outs = asyncio.run(through(engine, grown))
    assert outs[-1].outputs[0].token_ids == TOKENS
    assert len(outs[1].outputs[0].token_ids) in (2, 3), "the second, or both if the third was there by then"


def test_a_stop_string_ends_it_by_the_iteration(engine):
    stop = engine.tokenizer.decode(TOKENS[1:2])
    outs = asyncio.run(through(engine, lambda output: pytest.fail("it ended"), stop=[stop]))
    assert [out.outputs[0].finish_reason for out in outs] == [None, "stop"]
    PretendNode.latest.wait_for(0, m.Abort)
    assert engine.pending == [0]


def test_a_failure_is_this_streams_only(engine):
    def grown(output) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(through(engine, grown))
    PretendNode.latest.wait_for(0, m.Abort)
    assert engine.dead is None


def test_the_end_of_the_engine_reaches_the_iteration(engine):
    def grown(output) -> bool:
        engine.client.fail(EngineDeadError("rank 0 died"))
        return True

    with pytest.raises(EngineDeadError, match="rank 0 died"):
        asyncio.run(through(engine, grown))
