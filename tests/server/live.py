"""A real server on nonet-tiny for tests: ranks, engine, and HTTP in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from nonet import AsyncLLM
from nonet.server.run import serve_one

SETTINGS = {"enable_expert_parallel": True, "all2all_backend": "shm", "dtype": "float32"}


class Live:
    """`url` answers until `stop()`, which returns the exit code."""

    def __init__(self, **settings) -> None:
        self.llm = AsyncLLM("nonet-tiny", **{**SETTINGS, **settings})
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.code: int | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="live-server")
        self._thread.start()

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            self.code = runner.run(serve_one(self.llm, [listener], self._stop))

    def begin_stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self, timeout_s: float = 60.0) -> int | None:
        """The exit code once the server ends by itself."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the server did not end"
        return self.code

    def close(self) -> int | None:
        self.begin_stop()
        try:
            return self.wait()
        finally:
            self.llm.close()

    def all_free(self, timeout_s: float = 20.0) -> bool:
        """Whether all blocks are back and no token is outstanding, soon."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.llm.client.stats()
            if all(s.free_blocks == s.num_blocks for s in stats) and not any(self.llm.pending):
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def live(**settings) -> Iterator[Live]:
    server = Live(**settings)
    try:
        yield server
    finally:
        server.close()
