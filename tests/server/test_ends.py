"""How a server process ends: told to stop, told twice, or with a dead engine. Always within a bound."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import httpx
import pytest

from tests.server.live import live

LONG = {"prompt": "a b c", "max_tokens": 1900, "ignore_eos": True, "stream": True, "temperature": 0}


class Reader(threading.Thread):
    """A streaming client; `lines` is what it got."""

    def __init__(self, url: str, **changes) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.started_reading = threading.Event()
        self._url, self._body = url, {**LONG, **changes}
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=self._body) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.started_reading.set()

    def end(self) -> str:
        """The last line with data."""
        self.join(60)
        assert not self.is_alive()
        return [line for line in self.lines if line][-1]


def test_told_to_stop_it_finishes_what_is_open():
    with live(data_parallel_size=1, num_blocks=256) as server:
        reader = Reader(server.url, max_tokens=150)
        assert reader.started_reading.wait(30)
        server.begin_stop()
        assert server.wait() == 0
        assert reader.end() == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_after_the_time_allowed_what_is_open_is_aborted():
    with live(data_parallel_size=1, num_blocks=256, shutdown_timeout_s=0.5) as server:
        readers = [Reader(server.url), Reader(server.url, prompt=["a", "b"], n=2)]
        assert all(reader.started_reading.wait(30) for reader in readers)
        began = time.monotonic()
        server.begin_stop()
        assert server.wait() == 0
        assert time.monotonic() - began < 15
        for reader in readers:
            error = json.loads(reader.end().removeprefix("data: "))["error"]
            assert error["message"] == "the server is stopping"
        assert server.all_free()


def test_a_dead_rank_ends_streams_with_an_error_then_the_server():
    with live(data_parallel_size=2, num_blocks=256) as server:
        readers = [Reader(server.url) for _ in range(8)]
        assert all(reader.started_reading.wait(30) for reader in readers)
        began = time.monotonic()
        os.kill(server.llm.client.pids[1], signal.SIGKILL)
        for reader in readers:
            error = json.loads(reader.end().removeprefix("data: "))["error"]
            assert "rank 1 died (SIGKILL)" in error["message"]
            assert error["type"] == "service_unavailable"
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert "rank 1" in refused.json()["error"]["message"]
        assert server.wait() == 5
        assert time.monotonic() - began < 10
