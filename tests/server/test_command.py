"""The real command `nonet serve` in a process of its own: what clients see and what is left, however it ends."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import living, started_by
from tests.server.test_ends import Reader

ROOT = str(Path(__file__).parent.parent.parent)
ARGUMENTS = ["nonet-tiny", "-dp", "2", "--enable-expert-parallel", "--all2all-backend", "shm", "--num-blocks", "512"]
STREAMS = 32
_WAIT_S = 60.0


class Command:
    """`nonet serve`, from its first line on standard error to its last."""

    def __init__(self, *arguments: str, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nonet", "serve", *ARGUMENTS, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self.family: list[psutil.Process] = []
        if wait:
            first = self.process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
            assert found, first + self.process.stderr.read()
            self.url = f"http://127.0.0.1:{found[1]}"
            self.look()

    def look(self) -> None:
        """Remember all it has started so far."""
        self.family = started_by(self.process.pid)

    def of(self, module: str) -> list[psutil.Process]:
        return started_by(self.process.pid, module)

    def ranks(self) -> list[psutil.Process]:
        """Forked by the supervisor, so they look like it; it is the one whose parent is the command."""
        (supervisor,) = [p for p in self.of("nonet.launch.local") if p.ppid() == self.process.pid]
        return supervisor.children()

    def end(self) -> tuple[int, str]:
        """(exit code, what it said after the first line), once it and all it started have ended."""
        code = self.process.wait(_WAIT_S)
        assert living([p.pid for p in self.family], within_s=20) == []
        return code, self.process.stderr.read()


@contextmanager
def command(*arguments: str, wait: bool = True) -> Iterator[Command]:
    shared = set(os.listdir("/dev/shm"))
    made = Command(*arguments, wait=wait)
    try:
        yield made
        made.end()
        assert set(os.listdir("/dev/shm")) <= shared
    finally:
        made.process.kill()
        made.process.wait()
        made.process.stderr.close()


def streams(url: str) -> list[Reader]:
    readers = [Reader(url) for _ in range(STREAMS)]
    assert all(reader.started_reading.wait(_WAIT_S) for reader in readers)
    return readers


def error_at_the_end(reader: Reader) -> str:
    return json.loads(reader.end().removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("count", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_killed_rank_under_streams(count):
    with command("--port", "0", "--api-server-count", count) as server:
        readers = streams(server.url)
        victim = server.ranks()[1]
        at = time.monotonic()
        victim.kill()
        refused = []
        while server.process.poll() is None and time.monotonic() - at < 10:
            try:
                refused.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=10))
            except httpx.TransportError:  # it is gone
                break
            time.sleep(0.1)
        assert server.process.wait(10) == 5
        assert time.monotonic() - at < 10
        ends = [error_at_the_end(reader) for reader in readers]
        (died,) = set(ends)
        assert re.fullmatch(r"rank \d died \(SIGKILL\)", died)
        assert refused[-1].status_code == 503
        assert refused[-1].json()["error"]["message"] == died
        assert {response.status_code for response in refused} == {503}
        assert server.end() == (5, f"error: {died}\n")


def test_a_killed_api_process_under_streams():
    """Its own clients lose their connection; those of the other get an error event that names it."""
    with command("--port", "0", "--api-server-count", "2") as server:
        readers = [Lossy(server.url) for _ in range(STREAMS)]
        assert all(reader.started_reading.wait(_WAIT_S) for reader in readers)
        victim = server.of("nonet.server.api_process")[0]
        at = time.monotonic()
        victim.kill()
        code, said = server.end()
        assert time.monotonic() - at < 15
        words = rf"API process \d \(pid {victim.pid}\) died \(SIGKILL\)"
        assert code == 5
        assert re.fullmatch(rf"error: {words}\n", said)
        for reader in readers:
            last = reader.end()
            assert reader.lost or re.fullmatch(words, json.loads(last.removeprefix("data: "))["error"]["message"])


class Lossy(Reader):
    """`lost` if its connection broke."""

    lost = False

    def run(self) -> None:
        try:
            super().run()
        except httpx.TransportError:
            self.lost = True


def test_mistakes_harm_nobody_and_sigterm_lets_streams_end():
    """Of others at start-up, and of clients: the running server answers after all of them, on the rank they ask for."""
    with command("--port", "0", "--shutdown-timeout-s", "40", "--api-server-count", "2") as server:
        port = server.url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "nonet", "serve", *ARGUMENTS, "--port", port],
            capture_output=True, text=True, timeout=_WAIT_S, cwd=ROOT,
        )  # fmt: skip
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr == f"error: port = {port}: is in use on 127.0.0.1; choose another, or 0 for a free one\n"
        with httpx.Client(base_url=server.url, timeout=60) as http:
            large = http.post("/v1/completions", json={"prompt": "a" * 10_000_000})
            assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
            assert http.post("/v1/completions", content=b"{").status_code == 400
            for _ in range(4):
                pinned = httpx.post(
                    f"{server.url}/v1/completions", json={"prompt": "a b"}, headers={"X-data-parallel-rank": "1"}
                )  # a connection of its own: any of the processes may take it
                assert pinned.status_code == 200
            page = http.get("/metrics").text
            ran = dict(re.findall(r'^nonet:tokens_total{engine="(\d)".*} (\S+)$', page, re.MULTILINE))
            assert (float(ran["0"]), float(ran["1"]) > 0) == (0, True)
            readers = [Reader(server.url, max_tokens=60) for _ in range(8)]
            assert all(reader.started_reading.wait(_WAIT_S) for reader in readers)
            assert http.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert [reader.end() for reader in readers] == ["data: [DONE]"] * 8
        assert server.end() == (0, "")


@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGTERM, -signal.SIGTERM), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_while_the_engine_starts_leaves_nothing(by, code):
    with command("--port", "0", "--api-server-count", "2", wait=False) as server:
        while not server.of("nonet.launch.local"):
            time.sleep(0.05)
        time.sleep(0.3)
        server.look()
        server.process.send_signal(by)
        left, said = server.end()
        assert left == code
        assert "Traceback" not in said


def test_a_port_that_needs_a_privilege():
    def give_it_up() -> None:
        ctypes.CDLL(None).prctl(24, 10, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_NET_BIND_SERVICE

    first_free = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first_free <= 81:
        pytest.skip("every port is free to all here")
    done = subprocess.run(
        [sys.executable, "-m", "nonet", "serve", *ARGUMENTS, "--port", "81"],
        capture_output=True, text=True, timeout=_WAIT_S, cwd=ROOT, preexec_fn=give_it_up,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: port = 81: you have no permission to listen on it; use one from 1024 on\n"
