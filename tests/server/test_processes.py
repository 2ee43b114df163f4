"""The server's processes: the port, the start, and every end, with a stand-in for what answers HTTP."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nonet.config.schema import ServerConfig
from nonet.errors import ConfigError
from nonet.server.listen import listen, url
from tests.processes import living, started_by

ROOT = str(Path(__file__).parent.parent.parent)
_WAIT_S = 30.0


class Server:
    """`serve` in a process of its own, on nonet-tiny over two ranks."""

    def __init__(self, entry: str = "answer", **settings: object) -> None:
        settings = {
            "data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "shm", "port": 0,
            "shutdown_timeout_s": 1.0, **settings,
        }  # fmt: skip
        script = (
            "import sys; from nonet.config import build_config; from nonet.server import processes\n"
            "processes._STOP_MARGIN_S = processes._DEATH_S = 1.0\n"
            f"sys.exit(processes.serve(build_config('nonet-tiny', **{settings!r}), 'tests.launch.entries:{entry}'))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        lines = [self.process.stderr.readline()]
        if entry == "deaf_to_the_end":  # says so in each process
            lines += [self.process.stderr.readline() for _ in range(int(settings.get("api_server_count", 1)))]
        self.first_line = next((line for line in lines if "deaf" not in line), "")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.first_line)
        self.port = int(found[1]) if found else 0
        self.family = started_by(self.process.pid)
        self.api = [p.pid for p in started_by(self.process.pid, "nonet.server.api_process")]

    def ask(self, length: int) -> Talk:
        return Talk(self.port, length)

    def end(self) -> tuple[int, str]:
        """(exit code, what was said after the first line), once it and all it started have ended."""
        code = self.process.wait(_WAIT_S)
        assert living([p.pid for p in self.family]) == []
        return code, self.process.stderr.read()


class Talk:
    """A conversation with the stand-in."""

    def __init__(self, port: int, length: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S)
        self._socket.sendall(f"{length}\n".encode())
        self._lines = self._socket.makefile()
        self.pid, *self.ranks = (int(word) for word in self._lines.readline().split())

    def token(self) -> None:
        assert self._lines.readline() == "token\n"

    def rest(self) -> tuple[int, str]:
        """(tokens that still came, the last word)"""
        lines = self._lines.read().split("\n")[:-1]
        self._lines.close()
        self._socket.close()
        return lines.count("token"), lines[-1] if lines else ""


@contextmanager
def serving(**settings: object) -> Iterator[Server]:
    server = Server(**settings)
    try:
        yield server
    finally:
        server.process.kill()
        server.end()
        server.process.stderr.close()


# -- the port ---------------------------------------------------------------------------------------------------------


def test_a_free_port_and_its_address():
    server = ServerConfig(port=0)
    (made,) = listen(server)
    with made:
        assert url(server, [made]) == f"http://127.0.0.1:{made.getsockname()[1]}"
        socket.create_connection(made.getsockname()).close()


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port = {port}: is in use on 127.0.0.1; choose another, or 0"):
            listen(ServerConfig(port=port))


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("no.such.host.invalid", "^host = 'no.such.host.invalid': is not known here; use an address of this machine"),
        ("192.0.2.1", "^host = '192.0.2.1': is no address of this machine"),
        ("a" * 70 + ".b", "is not known here"),
    ],
)
def test_a_host_that_is_not_here(host, words):
    with pytest.raises(ConfigError, match=words):
        listen(ServerConfig(host=host, port=0))


def test_a_port_that_needs_a_privilege(monkeypatch):
    def forbidden(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"bind": forbidden}))
    with pytest.raises(ConfigError, match="^port = 80: you have no permission to listen on it; use one from 1024 on"):
        listen(ServerConfig(port=80))


# -- a life -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_port_in_use_starts_nothing(count):
    with socket.create_server(("127.0.0.1", 0)) as other:
        at = time.monotonic()
        with serving(port=other.getsockname()[1], api_server_count=count) as server:
            code, said = server.end()
            assert (code, "ConfigError: port = " in server.first_line + said) == (1, True)
            assert time.monotonic() - at < _WAIT_S


@pytest.mark.parametrize(("count", "by"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_it_serves_and_ends_on_a_signal(count, by):
    with serving(api_server_count=count) as server:
        processes = ", 2 API processes" if count == 2 else ""
        assert server.first_line == f"serving nonet-tiny at http://127.0.0.1:{server.port} (2 ranks{processes})\n"
        talks = [server.ask(5) for _ in range(6)]
        assert [talk.rest() for talk in talks] == [(5, "done")] * 6
        assert {talk.pid for talk in talks} <= ({server.process.pid} if count == 1 else set(server.api))
        server.process.send_signal(by)
        assert server.end() == (0, "")


def test_processes_deaf_to_a_signal_are_killed_in_time():
    with serving(entry="deaf_to_the_end", api_server_count=2) as server:
        server.process.send_signal(signal.SIGTERM)
        at = time.monotonic()
        assert server.end() == (1, "")
        assert time.monotonic() - at < 1.0 + 1.0 + 10.0


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_rank_ends_every_stream_and_the_server(count):
    with serving(api_server_count=count) as server:
        talks = [server.ask(2000) for _ in range(8)]
        for talk in talks:
            talk.token()
        at = time.monotonic()
        os.kill(talks[0].ranks[1], signal.SIGKILL)
        assert {talk.rest()[1] for talk in talks} == {"rank 1 died (SIGKILL)"}
        assert server.end() == (5, "error: rank 1 died (SIGKILL)\n")
        assert time.monotonic() - at < 10


@pytest.mark.parametrize("count", [1, 2])
def test_what_does_not_hear_of_the_engines_end_is_ended(count):
    with serving(entry="deaf_to_the_end", api_server_count=count) as server:
        rank = next(p for p in server.family if p.ppid() not in (server.process.pid, os.getpid()))
        at = time.monotonic()
        rank.kill()
        code, said = server.end()
        assert code == 5
        assert re.fullmatch(r"error: rank \d died \(SIGKILL\)\n", said)
        assert time.monotonic() - at < 15


def test_a_killed_api_process_ends_everything_and_is_named():
    with serving(api_server_count=2) as server:
        talks = [server.ask(2000) for _ in range(8)]
        for talk in talks:
            talk.token()
        os.kill(server.api[0], signal.SIGKILL)
        words = f"API process 1 (pid {server.api[0]}) died (SIGKILL)"
        for talk in talks:
            last = talk.rest()[1]
            assert last == words if talk.pid == server.api[1] else last in ("token", "")
        assert server.end() == (5, f"error: {words}\n")


@pytest.mark.parametrize("entry", ["answer", "deaf_to_the_end"])
def test_a_killed_main_process_leaves_nothing(entry):
    with serving(entry=entry, api_server_count=2) as server:
        assert len(server.family) == 2 + 1 + 2
        server.process.kill()
        assert server.end()[0] == -signal.SIGKILL


@pytest.mark.parametrize("count", [1, 2])
def test_an_api_process_that_cannot_start_says_why(count):
    with serving(entry="refuse", api_server_count=count) as server:
        code, said = server.end()
        words = server.first_line + said
        assert code == (1 if count == 1 else 2)
        assert "chat_template = 'x.jinja': is no file" in words
