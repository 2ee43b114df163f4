"""What the ranks of `test_local` do, and what answers for the HTTP server in `test_processes`. Light to import."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from nonet.config.place import Place
from nonet.errors import ConfigError, NonetError
from nonet.types import SamplingParams


def rest(place: Place, payload: dict[str, Any]) -> None:
    time.sleep(600)


def deaf(place: Place, payload: dict[str, Any]) -> None:
    """Deaf to every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


def exits(place: Place, payload: dict[str, Any]) -> None:
    """Ends with an exit code of its own when told to; leaves a file once it can be."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
    Path(payload["folder"], str(place.rank)).touch()
    time.sleep(600)


def leave(place: Place, payload: dict[str, Any]) -> None:
    """Say where this rank stands, in a file and on standard output, and end well."""
    print("this must not reach the events", place.rank, flush=True)
    said = {**dataclasses.asdict(place), "stdin": sys.stdin.read(), "word": os.environ.get("NONET_WORD")}
    Path(payload["folder"], f"{place.rank}.json").write_text(json.dumps(said))


def end(place: Place, payload: dict[str, Any]) -> None:
    """The chosen rank ends in the chosen way, the others rest."""
    if place.rank != payload["rank"]:
        rest(place, payload)
    if payload["how"] == "raise":
        raise ValueError("on purpose")
    if payload["how"] == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.Signals[payload["how"]])


async def answer(llm: Any, sockets: list[socket.socket]) -> int:
    """Stands in for the HTTP server. A line `prompt length` gets a line for each token, then "done" or the error."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers = [await asyncio.start_server(partial(_converse, llm), sock=each) for each in sockets]
    ends = [asyncio.create_task(stop.wait()), asyncio.create_task(llm.wait_dead())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    for server in servers:
        server.close()
    dead = llm.dead
    if dead is None:
        return 0
    while _conversations:
        await asyncio.wait(_conversations)
    return int(dead.exit_code)


async def deaf_to_the_end(llm: Any, sockets: list[socket.socket]) -> int:
    """An HTTP server that hears neither signals nor that the engine is dead."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print("deaf", file=sys.stderr, flush=True)
    await asyncio.sleep(600)
    return 0


async def refuse(llm: Any, sockets: list[socket.socket]) -> int:
    raise ConfigError("chat_template", "x.jinja", "is no file")


_conversations: set[asyncio.Task[None]] = set()


async def _converse(llm: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    task = asyncio.current_task()
    assert task is not None
    _conversations.add(task)
    task.add_done_callback(_conversations.discard)
    length = int(await reader.readline())
    said = "done"
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    writer.write(f"{os.getpid()} {' '.join(map(str, llm.client.pids))}\n".encode())
    try:
        async for _ in llm.stream([7, 8, 9], params):
            writer.write(b"token\n")
            await writer.drain()
    except NonetError as error:
        said = str(error)
    writer.write(f"{said}\n".encode())
    await writer.drain()
    writer.close()
