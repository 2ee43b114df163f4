"""Several server processes on one port: each hands its row of counters to the others, so that any can show the sum.

Used by `run`. Rows travel over Unix sockets with abstract names (no file is left behind), named after the listening
socket that all processes inherited.
"""

from __future__ import annotations

import asyncio
import os
import socket

from nonet.server.errors import HttpError
from nonet.server.metrics import Metrics

_WAIT_S = 5.0


class Peers:
    """This process is `number` of 1 to `count`; with one process there is nothing to do."""

    def __init__(self, metrics: Metrics, listener: socket.socket, number: int, count: int) -> None:
        self._metrics, self._number = metrics, number
        self._name = f"\0nonet-rows-{os.fstat(listener.fileno()).st_ino}"
        self._others = [i for i in range(1, count + 1) if i != number] if count > 1 else []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Peers:
        if self._others:
            self._server = await asyncio.start_unix_server(self._give, f"{self._name}-{self._number}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(self._metrics.row())
            await writer.drain()
        except OSError:
            pass  # who asked is gone
        finally:
            writer.close()

    async def rows(self) -> list[bytes]:
        """The others' rows. Raises HttpError if one does not answer: a sum without it would run backwards."""
        return await asyncio.gather(*(self._row(number) for number in self._others))

    async def _row(self, number: int) -> bytes:
        try:
            async with asyncio.timeout(_WAIT_S):
                reader, writer = await asyncio.open_unix_connection(f"{self._name}-{number}")
                try:
                    return await reader.readexactly(len(self._metrics.row()))
                finally:
                    writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise HttpError(503, f"API process {number} does not hand over its counters ({error!r})") from error
