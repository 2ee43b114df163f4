"""One of several processes that answer HTTP: how the main process sees it, and what runs in it.

Used by `processes`. Its standard input brings the order and is its leash, its standard output carries one JSON line an
event. Knows no HTTP: a coroutine function, named by the order, answers on the listening sockets it inherits.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import IO, Any

from nonet.engine.llm import AsyncLLM
from nonet.errors import EngineDeadError, NonetError

ServeOne = Callable[[AsyncLLM, list[socket.socket]], Awaitable[int]]
_LEASH_S = 3.0  # when the main process is gone, this one ends by itself at the latest then


class ApiProcess:
    """One process that answers HTTP, as the main process sees it."""

    def __init__(self, number: int, sockets: list[socket.socket]) -> None:
        self.number, self.ready = number, False
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from nonet.server.api_process import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[each.fileno() for each in sockets],
            start_new_session=True,  # Ctrl-C goes to the main process, which passes it on in order
        )

    def order(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: its standard output says so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def next_event(self) -> dict[str, Any] | None:
        """None once it ended."""
        line = self.stdout.readline()
        return json.loads(line) if line else None

    def how_it_ended(self) -> str:
        try:
            code = self.process.wait(_LEASH_S)
        except subprocess.TimeoutExpired:  # it closed its output and hangs
            self.process.kill()
            code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        self.process.kill()  # nothing happens if it has ended
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def main() -> None:
    """An API process: read the order, attach to the engine, answer HTTP until told to stop or the engine is dead."""
    line = sys.stdin.buffer.readline()
    if not line:  # the main process is gone already
        sys.exit(EngineDeadError.exit_code)
    order = json.loads(line)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to standard error
    threading.Thread(target=_hold_leash, daemon=True, name="nonet-leash").start()
    sockets = [socket.socket(fileno=fd) for fd in order["sockets"]]
    try:
        serve_one = find(order["entry"])
        llm = AsyncLLM.attach(order["attachment"])
        try:
            events.write(json.dumps({"event": "ready"}) + "\n")
            code = asyncio.run(answer(serve_one, llm, sockets))
        finally:
            llm.close()
    except NonetError as error:
        with contextlib.suppress(BrokenPipeError):
            events.write(json.dumps({"event": "failed", "text": str(error), "code": error.exit_code}) + "\n")
        code = error.exit_code
    sys.exit(code)


def _hold_leash() -> None:
    """Thread: the main process is gone, however it ended, when standard input closes."""
    while os.read(0, 512):
        continue
    time.sleep(_LEASH_S)  # open streams are told, and the server ends in order, if it can
    os._exit(EngineDeadError.exit_code)


def find(entry: str) -> ServeOne:
    """What answers HTTP, from "module:function"; imported only now."""
    module, function = entry.split(":")
    found: ServeOne = getattr(importlib.import_module(module), function)
    return found


async def answer(serve_one: ServeOne, llm: AsyncLLM, sockets: list[socket.socket]) -> int:
    """A coroutine of it, as asyncio.run wants one."""
    return await serve_one(llm, sockets)
