"""Several server processes on one port: any of them shows the sum of all counters."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from nonet.server.errors import HttpError
from nonet.server.metrics import PLACES, Metrics
from nonet.server.peers import Peers


def test_rows_of_three_processes_add_up():
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            all_metrics = [Metrics() for _ in range(3)]
            for i, metrics in enumerate(all_metrics):
                metrics.count("vllm:generation_tokens", 10**i)
            async with contextlib.AsyncExitStack() as stack:
                peers = [
                    await stack.enter_async_context(Peers(metrics, listener, i + 1, 3))
                    for i, metrics in enumerate(all_metrics)
                ]
                for metrics, own in zip(all_metrics, peers, strict=True):
                    total = metrics.summed(await own.rows())
                    assert total[PLACES["vllm:generation_tokens"]] == 111

    asyncio.run(run())


def test_one_process_has_no_peers():
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with Peers(Metrics(), listener, 0, 1) as alone:
                assert await alone.rows() == []

    asyncio.run(run())


def test_a_peer_that_is_gone_is_named():
    """A sum without it would look as if counters ran backwards."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with Peers(Metrics(), listener, 1, 2) as left:
                with pytest.raises(HttpError, match="API process 2 does not hand over its counters"):
                    await left.rows()

    asyncio.run(run())
