"""Jobs: streams of several prompts become one, and end together."""

from __future__ import annotations

import asyncio

import pytest

from nonet.errors import EngineDeadError, RequestError
from nonet.server.http import ClientGone, while_connected
from nonet.server.job import Job, Jobs, News
from nonet.server.metrics import ENDED, PLACES, Metrics
from nonet.server.prompts import PromptTokens
from nonet.types import SamplingParams
from tests.server.pretend_llm import PretendLLM


def job_of(llm: PretendLLM, prompts: int = 1, n: int = 1, max_tokens: int = 3) -> Job:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return Job(Jobs(llm, Metrics()), "id", [PromptTokens([5], None)] * prompts, [params] * prompts)


def value(job: Job, name: str) -> float:
    return job._jobs.metrics.summed([])[PLACES[name]]


async def all_news(job: Job) -> list[list[News]]:
    return [found async for found in job.news()]


@pytest.mark.parametrize(("prompts", "n"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_every_sequence_is_told_once_and_whole(prompts, n):
    llm = PretendLLM()
    job = job_of(llm, prompts, n)
    news = [one for found in asyncio.run(all_news(job)) for one in found]
    for index in range(prompts * n):
        own = [one for one in news if one.index == index]
        assert {one.prompt for one in own} == {index // n}
        assert [token for one in own for token in one.token_ids] == llm.tokens
        assert "".join(one.text for one in own) == llm.tokenizer.decode(llm.tokens)
        assert [one.first for one in own] == [True] + [False] * (len(own) - 1)
        assert [one.finish_reason for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
    assert value(job, "vllm:generation_tokens") == 3 * prompts * n
    assert value(job, f"{ENDED}/length") == prompts * n


@pytest.mark.parametrize("prompts", [1, 3])
def test_what_waits_is_one_piece(prompts):
    """A slow reader gets all that came meanwhile at once, if the engine hands it over at once."""
    llm = PretendLLM(tokens=[67] * 50)

    async def run() -> list[int]:
        sizes = []
        async for found in job_of(llm, prompts, max_tokens=50).news():
            sizes.append(sum(len(one.token_ids) for one in found))
            for _ in range(10):
                await asyncio.sleep(0)
        return sizes

    sizes = asyncio.run(run())
    assert sum(sizes) == 50 * prompts
    assert prompts == 1 or max(sizes) > prompts


@pytest.mark.parametrize("prompts", [1, 3])
def test_leaving_aborts_everything(prompts):
    llm = PretendLLM(tokens=[67] * 50)
    job = job_of(llm, prompts, n=2, max_tokens=50)

    async def run() -> None:
        stream = job.news()
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert len(llm.aborted) == prompts
    assert not llm.open
    assert not job._jobs.open
    assert value(job, f"{ENDED}/abort") == 2 * prompts


@pytest.mark.parametrize("prompts", [1, 3])
def test_one_failure_ends_all(prompts):
    llm = PretendLLM()
    llm.error, llm.error_at = RequestError("prompt", "x", "no"), 1
    job = job_of(llm, prompts)
    with pytest.raises(RequestError, match="prompt = 'x': no"):
        asyncio.run(all_news(job))
    assert not llm.open
    assert value(job, f"{ENDED}/error") == prompts


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_stop_of_the_server_ends_open_jobs_with_its_reason(prompts):
    llm = PretendLLM()
    llm.hold.clear()
    job = job_of(llm, prompts, n=2)

    async def run() -> None:
        task = asyncio.create_task(all_news(job))
        await asyncio.sleep(0.01)
        await job._jobs.end_all(EngineDeadError("the server is stopping"))
        await asyncio.wait_for(task, 5)

    with pytest.raises(EngineDeadError, match="the server is stopping"):
        asyncio.run(run())
    assert not llm.open


def test_a_client_that_goes_away_ends_the_work():
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.set()

    async def run() -> None:
        messages = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])

        async def receive():
            await asyncio.sleep(0)
            return next(messages)

        with pytest.raises(ClientGone):
            await while_connected(receive, forever())
        assert ended.is_set()

        async def nothing():
            await asyncio.sleep(100)

        assert await while_connected(nothing, asyncio.sleep(0, "done")) == "done"
        with pytest.raises(ZeroDivisionError):
            await while_connected(nothing, _divide())

    asyncio.run(run())


async def _divide() -> float:
    return 1 / 0
