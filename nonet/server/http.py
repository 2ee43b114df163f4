"""Between HTTP and the routes: the gate every request passes, bodies, and noticing that a client is gone.

Used by `app`. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nonet.errors import RequestError
from nonet.openai.fields import Body, parse
from nonet.server.errors import HttpError, error_body, error_response

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=Body)
REQUEST_ID = "nonet.request_id"  # in an ASGI scope
DIRECT_SEND = "nonet.direct_send"  # also there: for what comes after the start of a response
_LONGEST_ID = 256
_BODY_S = 60.0  # a body has come by then
_DRAIN_S, _DRAIN_TIMES = 2.0, 4  # of a body that is too large this is read and dropped, so that the answer is heard


class Gate:
    """Before any route: the request's id, and the API key on /v1. Every response carries X-Request-Id."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope[REQUEST_ID], scope[DIRECT_SEND] = uuid.uuid4().hex, send

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", scope[REQUEST_ID].encode())]
            await send(message)

        app = self._app
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        try:
            scope[REQUEST_ID] = checked_id(given, "X-Request-Id") if given else scope[REQUEST_ID]
        except RequestError as error:
            app = error_response(error)
        if self._keys and scope["path"].startswith("/v1") and not self._admits(headers.get(b"authorization", b"")):
            app = error_response(HttpError(401, "Authorization: send 'Bearer KEY' with a key that this server knows"))
        await app(scope, receive, send_named)

    def _admits(self, authorization: bytes) -> bool:
        """Compares with every key, each in constant time."""
        scheme, _, key = authorization.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def checked_id(given: str, field: str) -> str:
    """A request's id that its client chose. Raises RequestError."""
    if not given.isascii() or not given.isprintable() or not 0 < len(given) <= _LONGEST_ID:
        raise RequestError(field, given[:40], f"use 1 to {_LONGEST_ID} printable ASCII characters")
    return given


async def read_body(request: Request, kind: type[BodyT], limit: int) -> BodyT:
    """The checked JSON body. Raises HttpError (413, 415) or RequestError."""
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise HttpError(415, f"Content-Type = {media[:80]!r}: send application/json", param="Content-Type")
    raw = await _read(request, limit)
    try:
        data = msgspec.json.decode(raw)
    except msgspec.ValidationError as error:  # a number beyond float64
        raise RequestError("body", f"{len(raw)} bytes", f"is not accepted: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("body", f"{len(raw)} bytes", f"send valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("body", f"{len(raw)} bytes", "is nested too deeply") from None
    return parse(kind, data)


async def _read(request: Request, limit: int) -> bytes:
    """The body; what announces or proves itself to be larger is not kept."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(int(announced), limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise BodyTooLarge(size, limit)
                parts.append(part)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise HttpError(408, f"body = {size} bytes: the rest did not come within {_BODY_S:g} s", param="body") from None
    return b"".join(parts)


class BodyTooLarge(HttpError):
    def __init__(self, size: int, limit: int) -> None:
        super().__init__(413, f"body = {size} bytes or more: send at most {limit} (max_request_bytes)", param="body")
        self.limit = limit


class TooLargeResponse(Response):
    """Answers at once, then drops some of what still comes: closing a socket with unread data would undo the answer."""

    def __init__(self, error: BodyTooLarge) -> None:
        body = msgspec.json.encode(error_body(error))
        super().__init__(body, 413, {"connection": "close"}, media_type="application/json")
        self._limit = error.limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        waits = any(name == b"expect" for name, _ in scope["headers"])  # for our leave to send: there is no body yet
        left, end = 0 if waits else _DRAIN_TIMES * self._limit, time.monotonic() + _DRAIN_S
        while left > 0 and (wait := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), wait)
            except TimeoutError:
                break
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.body", "body": b""})


class ClientGone(Exception):  # noqa: N818 - no error: nobody is there to be told
    """The client closed its connection."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: ClientGone then."""
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    both: list[asyncio.Future[Any]] = [task, watch]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in both:
            one.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Returns when the connection is closed."""
    while True:
        if (await receive())["type"] == "http.disconnect":
            return
