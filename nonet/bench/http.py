"""A small HTTP/1.1 client on asyncio streams: requests whose answers are read piece by piece as they arrive.

Used by `bench.client`. Small on purpose: a load client shares its machine with what it measures, and every piece of a
stream passes here. Connections are kept and used again. Redirects and proxies are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from urllib.parse import urlsplit

from nonet.errors import ConfigError

CONNECT_S = 30.0
_LINE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_ALL_BYTES = 1 << 30  # more than a stream ever puts by


class HttpError(Exception):
    """The conversation broke: no connection, no proper answer, or an end before the end."""


class _Reader(asyncio.StreamReader):
    """A stream whose arrivals may be taken before they are put by: `take` says whether it did."""

    take: Callable[[bytes], bool] | None = None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        if self.take is None or not self.take(data):
            super().feed_data(data)


class _Connection:
    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.used = False  # for an earlier request

    def usable(self) -> bool:
        return not self.writer.is_closing() and not self.reader.at_eof()


class Answer:
    """A server's answer: status and headers; the body comes by `pieces()`, `each()` or `read()`."""

    def __init__(self, status: int, reason: str, headers: dict[str, str], connection: _Connection) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        self._reader = connection.reader
        self.complete = False  # the body was read to its end, so the connection can be used again

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it arrives. Raises HttpError if it ends too early."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                chunks = _Chunks()
                while not chunks.ended:
                    arrived = await self._reader.read(_PIECE_BYTES)
                    if not arrived:
                        raise HttpError("the connection was closed before the answer ended")
                    if piece := chunks.add(arrived):
                        yield piece
                if chunks.held:
                    return  # what nobody asked for: this connection is not used again
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    piece = await self._reader.read(min(left, _PIECE_BYTES))
                    if not piece:
                        raise HttpError("the connection was closed before the answer ended")
                    left -= len(piece)
                    yield piece
            else:
                while piece := await self._reader.read(_PIECE_BYTES):
                    yield piece
                return  # the end of the connection was the end of the body
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise HttpError("the connection was closed before the answer ended") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise HttpError(f"the answer is no HTTP: {error}") from error
        self.complete = True

    async def each(self, take: Callable[[bytes], None]) -> None:
        """Like `pieces`, but each goes to `take` right when it arrives: no task wakes up for it."""
        if "chunked" not in self.headers.get("transfer-encoding", "").lower():
            async for piece in self.pieces():
                take(piece)
            return
        chunks, failed = _Chunks(), []

        def arrived(data: bytes) -> bool:
            try:
                if piece := chunks.add(data):
                    take(piece)
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)
            return not failed and not chunks.ended

        try:
            goes_on = arrived(await self._reader.read(_ALL_BYTES))  # what came with the head
            self._reader.take = arrived
            if goes_on:
                await self._reader.read(_ALL_BYTES)  # wakes up at the end: of the connection, or the last arrival
        except ConnectionError as error:
            raise HttpError("the connection was closed before the answer ended") from error
        finally:
            self._reader.take = None
        if failed and isinstance(failed[0], ValueError):
            raise HttpError(f"the answer is no HTTP: {failed[0]}") from failed[0]
        if failed:
            raise failed[0]
        if not chunks.ended:
            raise HttpError("the connection was closed before the answer ended")
        self.complete = not chunks.held

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


class _Chunks:
    """The chunked coding undone: what arrives in, what it says out; all whole chunks of an arrival are one piece."""

    def __init__(self) -> None:
        self.held = b""  # not understood yet: a part of a chunk, or what follows the last
        self._trailers = False
        self.ended = False

    def add(self, arrived: bytes) -> bytes:
        """Raises ValueError for what is no chunk."""
        held = self.held + arrived if self.held else arrived
        found, at = [], 0
        while not self.ended:
            line_end = held.find(b"\n", at)
            if line_end < 0:
                if len(held) - at > _LINE_BYTES:
                    raise ValueError("a line of a chunk's size is too long")
                break
            if self._trailers:
                self.ended = not held[at:line_end].strip()
                at = line_end + 1
                continue
            size = int(held[at:line_end].split(b";")[0], 16)
            if not size:
                self._trailers, at = True, line_end + 1
                continue
            end = line_end + 1 + size
            if len(held) < end + 2:
                break
            found.append(held[line_end + 1 : end])
            at = end + 2
        self.held = held[at:]
        return found[0] if len(found) == 1 else b"".join(found)


class Http:
    """Requests to one server. Raises ConfigError for an address that is none."""

    def __init__(self, base_url: str, headers: Mapping[str, str], *, insecure: bool = False) -> None:
        url = urlsplit(base_url)
        try:
            port = url.port
        except ValueError:
            port = -1
        if url.scheme not in ("http", "https") or not url.hostname or port == -1:
            raise ConfigError("--base-url", base_url, "use http://host:port or https://host:port")
        self.host, self.prefix = url.hostname, url.path.rstrip("/")
        self.port = port or (443 if url.scheme == "https" else 80)
        self._ssl: ssl.SSLContext | None = None
        if url.scheme == "https":
            self._ssl = ssl.create_default_context()
            if insecure:
                self._ssl.check_hostname, self._ssl.verify_mode = False, ssl.CERT_NONE
        name = f"[{self.host}]" if ":" in self.host else self.host
        fixed = {"Host": f"{name}:{self.port}", "User-Agent": "nonet-bench", "Accept": "*/*", **headers}
        for key, value in fixed.items():
            if not f"{key}{value}".isprintable() or not f"{key}{value}".isascii():
                raise ConfigError("--header", f"{key}={value}", "headers are printable ASCII")
        self._head = "".join(f"{key}: {value}\r\n" for key, value in fixed.items()).encode()
        self._idle: list[_Connection] = []

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes = b"", request_id: str | None = None
    ) -> AsyncIterator[Answer]:
        """Send a request; the block gets its answer. Leaving the block early closes the connection.

        A kept connection that the server has closed meanwhile is replaced by a new one, once. Raises HttpError.
        """
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n".encode() + self._head
        if request_id is not None:
            head += f"X-Request-Id: {request_id}\r\n".encode()
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = self._take() or await self._connect()
        answer: Answer | None = None
        try:
            try:
                answer = await _exchange(connection, head + body)
            except HttpError:
                if not connection.used:
                    raise
                connection.writer.close()
                connection = await self._connect()
                answer = await _exchange(connection, head + body)
            yield answer
        finally:
            keep = answer is not None and answer.complete and answer.headers.get("connection", "").lower() != "close"
            if keep and connection.usable():
                connection.used = True
                self._idle.append(connection)
            else:
                connection.writer.close()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            connection.writer.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            loop = asyncio.get_running_loop()
            reader = _Reader(limit=_LINE_BYTES, loop=loop)
            protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
            opened = loop.create_connection(lambda: protocol, self.host, self.port, ssl=self._ssl)
            transport, _ = await asyncio.wait_for(opened, CONNECT_S)
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        except TimeoutError as error:
            raise HttpError(f"{self.host}:{self.port} does not answer within {CONNECT_S:.0f} s") from error
        except OSError as error:
            known = error.errno is not None and error.errno > 0  # below 0: the name of the host is none
            reason = os.strerror(error.errno) if known and error.errno else error
            raise HttpError(f"cannot connect to {self.host}:{self.port}: {reason}") from error
        return _Connection(reader, writer)

    async def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.writer.close()
        for connection in self._idle:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(connection.writer.wait_closed(), 1.0)
        self._idle.clear()


async def _exchange(connection: _Connection, message: bytes) -> Answer:
    """Send a request and read the head of its answer. Raises HttpError."""
    reader, writer = connection.reader, connection.writer
    try:
        writer.write(message)
        await writer.drain()
        version, _, rest = (await reader.readuntil(b"\n")).decode("latin-1").partition(" ")
        status, _, reason = rest.strip().partition(" ")
        headers: dict[str, str] = {}
        while line := (await reader.readuntil(b"\n")).decode("latin-1").strip():
            key, _, value = line.partition(":")
            headers[key.strip().lower()] = value.strip()
        if not version.startswith("HTTP/"):
            raise HttpError(f"the answer is no HTTP: {version[:40]!r}")
        return Answer(int(status), reason, headers, connection)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise HttpError("the connection was closed before an answer came") from error
    except (ValueError, asyncio.LimitOverrunError) as error:
        raise HttpError(f"the answer is no HTTP: {error}") from error
