"""One server process: uvicorn on sockets that listen already, until it is told to stop or the engine is dead.

Used by `processes`. Whatever happens, it ends within a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from nonet.engine.llm import AsyncLLM
from nonet.errors import EngineDeadError
from nonet.server.app import Routes, create_app
from nonet.server.peers import Peers

log = logging.getLogger("nonet")
_ABORT_S = 1.0  # what was aborted says so to its clients within this
_LAST_WORDS_S = 1.5  # so long a server without an engine answers 503 before it ends
_KEEP_ALIVE_S = 65  # longer than the usual idle limit of proxies


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again when it has stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_one(llm: AsyncLLM, sockets: list[socket.socket], stop: asyncio.Event | None = None) -> int:
    """Answer HTTP on the sockets. Returns 0 after SIGTERM, SIGINT or `stop`, EngineDeadError's code if the engine died.

    When told to stop, nothing new is accepted, open requests go on for up to `shutdown_timeout_s` and are aborted
    then; a second signal aborts them at once. Raises ConfigError or ModelError (chat template).
    """
    app = create_app(llm)
    routes: Routes = app.state.routes
    config = llm.config.server
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=None,
        )
    )
    stop = stop or asyncio.Event()
    hurry = asyncio.Event()
    with _signals(stop, hurry):
        async with Peers(routes.metrics, sockets[0], llm.client.number, config.api_server_count) as peers:
            routes.peers = peers
            serving = asyncio.create_task(server.serve(sockets))
            try:
                return await _until_over(llm, routes, server, serving, stop, hurry)
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)


async def _until_over(
    llm: AsyncLLM,
    routes: Routes,
    server: _Server,
    serving: asyncio.Task[None],
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> int:
    """Wait for an end and bring it about; the exit code."""
    told, died = asyncio.create_task(stop.wait()), asyncio.create_task(llm.wait_dead())
    try:
        await asyncio.wait([told, died, serving], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()  # it does not end by itself: raises what went wrong
        dead = died.done()
        if dead:
            await asyncio.sleep(_LAST_WORDS_S)
        server.should_exit = True
        rushed = asyncio.create_task(hurry.wait())
        bound = _ABORT_S if dead else llm.config.server.shutdown_timeout_s
        await asyncio.wait([serving, rushed], timeout=bound, return_when=asyncio.FIRST_COMPLETED)
        rushed.cancel()
        if not serving.done():
            await routes.jobs.end_all(EngineDeadError("the server is stopping"))
            await asyncio.wait([serving], timeout=_ABORT_S)
        if not serving.done():  # a client that reads nothing
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await asyncio.wait([serving], timeout=_ABORT_S)
        return EngineDeadError.exit_code if dead else 0
    finally:
        told.cancel()
        died.cancel()
        await asyncio.gather(told, died, return_exceptions=True)


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets `stop`, the next one `hurry`. Only a main thread can hear them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def heard() -> None:
        (hurry if stop.is_set() else stop).set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, heard)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
