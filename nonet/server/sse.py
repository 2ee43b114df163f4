"""Server-sent events: a response that writes what an iterator brings, and ends it when the client goes away.

Used by `answers`. Raw ASGI: one send for each event, nothing between; `write_now` is the way without a task.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, cast

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nonet.errors import NonetError
from nonet.server.errors import error_body
from nonet.server.http import DIRECT_SEND, ClientGone, while_connected

log = logging.getLogger("nonet")
DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: %b\n\n" % encode(data)


class EventStream(Response):
    """`first`, then all that `events` brings. An error ends the stream as an event of its own, without [DONE]."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events
        self._direct: Send | None = None  # once the first event is written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send, scope.get(DIRECT_SEND, send)))
        except ClientGone:
            pass
        finally:
            self._direct = None
            await self._events.aclose()

    def write_now(self, body: bytes) -> bool:
        """Write an event while the iterator is being waited for. False if that is not possible: nothing is written.

        uvicorn's send waits for a client that reads too slowly and then writes, so it is run up to its first wait.
        """
        if self._direct is None:
            return False
        message = {"type": "http.response.body", "body": body, "more_body": True}
        sending = cast("Coroutine[Any, Any, None]", self._direct(message))
        try:
            sending.send(None)
        except StopIteration:
            return True
        sending.close()
        return False

    async def _write(self, send: Send, direct: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        self._direct = direct
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except NonetError as error:
            await send({"type": "http.response.body", "body": event(error_body(error)), "more_body": True})
        except Exception:
            log.exception("a stream failed")
            failed = NonetError("internal error; the server's log has the details")
            await send({"type": "http.response.body", "body": event(error_body(failed)), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
