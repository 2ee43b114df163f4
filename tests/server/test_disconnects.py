"""Clients that go away at random moments leave nothing behind and do not disturb the others."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from tests.server.live import Live, live

CLIENTS = 64
KINDS = 8  # different requests; clients beyond repeat them


@pytest.fixture(scope="module")
def server():
    with live(data_parallel_size=4, num_blocks=512) as running:
        yield running


def body_of(number: int) -> dict:
    """Prompts and lengths of all sizes; every fourth has several sequences."""
    rng = random.Random(number % KINDS)
    prompt = [rng.randrange(3, 8000) for _ in range(rng.randrange(1, 60))]
    return {
        "prompt": prompt, "max_tokens": rng.randrange(12, 36), "temperature": 0, "ignore_eos": True, "stream": True,
        "n": 2 if number % KINDS % 4 == 0 else 1,
    }  # fmt: skip


async def text_of(client: httpx.AsyncClient, number: int, leave_after: float | None = None) -> list[str] | None:
    """The texts of a streamed request; None for a client that leaves after so many seconds."""
    body = body_of(number)
    texts = [""] * body["n"]

    async def read() -> list[str]:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            ended = False
            async for line in response.aiter_lines():
                ended = line == "data: [DONE]"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                if ended:
                    break
            assert ended
        return texts

    if leave_after is None:
        return await read()
    try:
        async with asyncio.timeout(leave_after):
            return await read()
    except TimeoutError:
        return None


async def crowd(server: Live, alone: dict[int, list[str]], seed: int) -> int:
    """All at once, a third of them leaving; returns how many did leave before their end."""
    rng = random.Random(seed)
    leavers = set(rng.sample(range(CLIENTS), CLIENTS // 3))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        texts = await asyncio.gather(
            *(text_of(client, i, rng.uniform(0.0, 1.5) if i in leavers else None) for i in range(CLIENTS))
        )
    for number, text in enumerate(texts):
        if text is not None:
            assert text == alone[number % KINDS], f"client {number}"
    return sum(text is None for text in texts)


@pytest.fixture(scope="module")
def alone(server: Live) -> dict[int, list[str]]:
    """Each text of a lone run."""

    async def run() -> dict[int, list[str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return {number: await text_of(client, number) for number in range(KINDS)}

    return asyncio.run(run())


def repeat(server: Live, alone: dict[int, list[str]], seeds: range) -> None:
    left = 0
    for seed in seeds:
        left += asyncio.run(crowd(server, alone, seed))
        assert server.all_free()
    assert left > 0, "nobody left early: this tests nothing"


def test_those_who_stay_get_the_text_of_a_lone_run(server, alone):
    repeat(server, alone, range(2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_times(server, alone):
    repeat(server, alone, range(20))
