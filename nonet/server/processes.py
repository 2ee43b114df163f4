"""Runs the server: takes the port, starts the engine, and answers HTTP here or in several processes on one port.

Used by `nonet serve`. Each API process attaches to the engine (`Client.attachment`) and inherits the listening sockets.
Whatever ends, everything ends: the main process supervises, and its end, however it comes, is the end of all. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from nonet.config.schema import EngineConfig
from nonet.engine.client import Client
from nonet.engine.front_end import FrontEnd
from nonet.engine.llm import AsyncLLM
from nonet.errors import EngineDeadError, NonetError
from nonet.server.api_process import ApiProcess, answer, find
from nonet.server.listen import listen, url

_ENTRY = "nonet.server.run:serve_one"
_DEATH_S = 6.0  # open streams get their errors for at most so long when the engine is dead
_STOP_MARGIN_S = 5.0  # beside shutdown_timeout_s


def serve(config: EngineConfig, entry: str = _ENTRY) -> int:
    """Serve until SIGTERM or SIGINT (returns 0), or until something dies (one line on standard error; non-zero).

    Raises ConfigError, ModelError or CommTimeout if the server cannot start. `entry` names the coroutine function
    that answers HTTP on the sockets it is given, here or in each API process.
    """
    sockets = listen(config.server)
    try:
        if config.server.api_server_count == 1:
            return _serve_here(config, sockets, entry)
        return _serve_by_many(config, sockets, entry)
    finally:
        for each in sockets:
            each.close()


def _serve_here(config: EngineConfig, sockets: list[socket.socket], entry: str) -> int:
    serve_one = find(entry)
    llm = AsyncLLM(config)
    try:
        with _bounded_end(llm.client):
            _announce(config, llm.config, sockets)
            code = asyncio.run(answer(serve_one, llm, sockets))
        dead = llm.dead
    finally:
        llm.close()
    if dead is not None:
        _say(f"error: {dead}")
        return code or dead.exit_code
    return code


@contextlib.contextmanager
def _bounded_end(client: FrontEnd) -> Iterator[None]:
    """If the engine dies within the block, the block may go on for a while only; then the process ends."""
    over = threading.Event()

    def end(error: NonetError) -> None:
        if not over.wait(_DEATH_S):
            _say(f"error: {error}")
            os._exit(error.exit_code)

    def watch(error: NonetError) -> None:
        threading.Thread(target=end, args=(error,), daemon=True, name="nonet-end").start()

    take_back = client.on_death(watch)
    try:
        yield
    finally:
        take_back()
        over.set()


def _serve_by_many(config: EngineConfig, sockets: list[socket.socket], entry: str) -> int:
    with Client(config, front_ends=config.server.api_server_count + 1) as client:
        team = _Team(client, sockets, entry)
        try:
            return team.supervise(lambda: _announce(config, client.config, sockets))
        finally:
            team.close()


class _Team:
    """All API processes, and what happens when a signal comes, one of them ends, or the engine does."""

    def __init__(self, client: Client, sockets: list[socket.socket], entry: str) -> None:
        self._client, self._sockets, self._entry = client, sockets, entry
        self._server = client.config.server
        self._all: list[ApiProcess] = []
        self._stage = "starting"  # -> "serving" -> "stopping" (a signal came) or "dead"
        self._deadline: float | None = time.monotonic() + client.config.runtime.startup_timeout_s
        self._signals = self._passed_on = 0
        self._code = 0
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._take_back = client.on_death(lambda _: self._nudge())

    def supervise(self, announce: Callable[[], None]) -> int:
        """Start the API processes and stay until all have ended; returns the exit code of the server."""
        self._start()
        alive = set(self._all)
        with selectors.DefaultSelector() as poll:
            poll.register(self._wake, selectors.EVENT_READ)
            for api in alive:
                poll.register(api.stdout, selectors.EVENT_READ, api)
            while alive:
                left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                for ready, _ in poll.select(left):
                    if ready.data is None:
                        self._wake.recv(4096)
                    elif not self._hear(ready.data):
                        poll.unregister(ready.fileobj)
                        alive.remove(ready.data)
                self._decide(announce)
        error = self._client.error
        if error is None:
            return self._code
        _say(f"error: {error}")
        return self._code or error.exit_code

    def _start(self) -> None:
        for number in range(1, self._server.api_server_count + 1):
            self._all.append(ApiProcess(number, self._sockets))
        fds = [each.fileno() for each in self._sockets]
        for api in self._all:
            api.order({"entry": self._entry, "attachment": self._client.attachment(api.number), "sockets": fds})

    def _hear(self, api: ApiProcess) -> bool:
        """Take one event of an API process; False if it has ended."""
        event = api.next_event()
        if event is None:
            how = api.how_it_ended()
            if self._stage != "stopping":
                self._client.fail(EngineDeadError(f"API process {api.number} (pid {api.process.pid}) died ({how})"))
            return False
        if event["event"] == "ready":
            api.ready = True
        else:  # it says why it cannot go on
            self._code = event["code"]
            self._client.fail(EngineDeadError(event["text"]))
        return True

    def _decide(self, announce: Callable[[], None]) -> None:
        now = time.monotonic()
        if self._client.error is not None and self._stage != "dead":
            self._stage, self._deadline = "dead", now + _DEATH_S  # they know by their line to this process
        elif self._signals > self._passed_on:
            bound = 0.0 if self._passed_on else self._server.shutdown_timeout_s + _STOP_MARGIN_S
            self._stage, self._deadline, self._passed_on = "stopping", now + bound, self._signals
            for api in self._all:
                api.process.terminate()
        elif self._stage == "starting" and all(api.ready for api in self._all):
            self._stage, self._deadline = "serving", None
            announce()
        elif self._deadline is not None and now >= self._deadline:
            self._overdue()

    def _overdue(self) -> None:
        if self._stage == "starting":
            late = ", ".join(str(api.number) for api in self._all if not api.ready)
            self._client.fail(EngineDeadError(f"API process {late} was not ready in time (startup_timeout_s)"))
            return
        self._deadline = None
        if self._client.error is None:  # asked to stop, and it did not end in order
            self._code = 1
        for api in self._all:
            api.process.kill()

    def close(self) -> None:
        self._take_back()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for api in self._all:
            api.close()
        self._wake.close()
        self._waker.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._nudge()

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody waits
            self._waker.send(b".")


def _announce(asked: EngineConfig, config: EngineConfig, sockets: list[socket.socket]) -> None:
    names = asked.server.served_model_name or [asked.model.model]
    ranks, processes = config.world_size, config.server.api_server_count
    parts = f"{ranks} rank{'s' * (ranks > 1)}" + (f", {processes} API processes" if processes > 1 else "")
    _say(f"serving {names[0]} at {url(config.server, sockets)} ({parts})")


def _say(line: str) -> None:
    """One line for who runs the server."""
    sys.stderr.write(" ".join(line.split()) + "\n")
    sys.stderr.flush()
