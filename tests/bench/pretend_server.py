"""A server of completions that does to each request what the test wants: streams, dawdles, refuses, hangs up.

A request says what it wants by the first word of its prompt; see `_ANSWERS`. Everything is one event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator

GAP_S = 0.05


class PretendServer:
    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.connections = 0
        self.under_way = self.most_under_way = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._one(reader, writer):
                    pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.paths.append(path)
        self.headers.append(headers)
        if method == "GET":
            return await _plain(writer, 200, json.dumps({"data": [{"id": "nonet-tiny"}]}))
        asked = json.loads(body)
        self.bodies.append(asked)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            chat = "messages" in asked
            prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
            count = asked.get("max_tokens", asked.get("max_completion_tokens"))
            answer = _ANSWERS.get(str(prompt).split(" ")[0], _stream)
            return await answer(writer, count, chat)
        finally:
            self.under_way -= 1


async def _plain(writer: asyncio.StreamWriter, status: int, text: str) -> bool:
    writer.write(f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    await writer.drain()
    return True


async def _send(writer: asyncio.StreamWriter, data: object) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    event = f"data: {text}\n\n".encode()
    writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
    await writer.drain()


def _begin(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")


async def _stream(writer, count, chat, *, gap=0.0, usage=True, first=0, fail_at=None) -> bool:
    """`count` tokens, a role before them in a chat, the usage after them, and [DONE]."""
    _begin(writer)
    if chat:
        await _send(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    for i in range(count):
        if gap and i >= first:
            await asyncio.sleep(gap)
        if i == fail_at:
            return False
        end = "length" if i == count - 1 else None
        token = {"delta": {"content": " tick"}} if chat else {"text": " tick"}
        await _send(writer, {"choices": [{**token, "index": 0, "finish_reason": end}]})
    if usage:
        await _send(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
    await _send(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


async def _slow(writer, count, chat):
    return await _stream(writer, count, chat, gap=GAP_S)


async def _uncounted(writer, count, chat):
    return await _stream(writer, count, chat, usage=False)


async def _dropped(writer, count, chat):
    return await _stream(writer, count, chat, fail_at=2)


async def _refused(writer, count, chat):
    return await _plain(writer, 400, json.dumps({"error": {"message": "temperature = -1:\nuse 0 or more"}}))


async def _broken(writer, count, chat):
    return await _plain(writer, 500, "no JSON here")


async def _dead(writer, count, chat):
    """The engine dies within the stream."""
    _begin(writer)
    await _send(writer, {"choices": [{"text": " tick", "finish_reason": None}]})
    await _send(writer, {"error": {"message": "rank 1 died"}})
    await _send(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    return True


async def _unfinished(writer, count, chat):
    """A proper end of HTTP, but none of the stream."""
    _begin(writer)
    await _send(writer, {"choices": [{"text": " tick", "finish_reason": None}]})
    writer.write(b"0\r\n\r\n")
    return True


async def _garbled(writer, count, chat):
    _begin(writer)
    await _send(writer, "{not json")
    await _send(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    return True


async def _once(writer, count, chat):
    """Closes the connection afterwards without a word of it: whoever keeps it finds out at the next request."""
    await _stream(writer, count, chat)
    return False


async def _silent(writer, count, chat):
    await asyncio.sleep(30)
    return False


_ANSWERS = {
    "slow": _slow, "uncounted": _uncounted, "dropped": _dropped, "refused": _refused, "broken": _broken,
    "dead": _dead, "unfinished": _unfinished, "garbled": _garbled, "once": _once, "silent": _silent,
}  # fmt: skip


@contextlib.asynccontextmanager
async def pretend_server(port: int = 0) -> AsyncIterator[PretendServer]:
    """On that or a free port of this host, until the block ends."""
    pretend = PretendServer()
    tasks: set[asyncio.Task] = set()

    def connected(reader, writer) -> None:
        task = asyncio.ensure_future(pretend.handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    pretend.port = server.sockets[0].getsockname()[1]
    try:
        yield pretend
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


class Elsewhere:
    """A pretend server in a thread, for a command that has an event loop of its own."""

    def __enter__(self) -> int:
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(20)
        return self._port

    async def _run(self) -> None:
        self._end = asyncio.Event()
        async with pretend_server() as server:
            self._port = server.port
            self._ready.set()
            await self._end.wait()

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()
