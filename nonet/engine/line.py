"""The line between the process that started the engine and one that attached to it: whoever ends, the other hears it.

Used by `client` (Switchboard) and `attached` (Line). A Unix socket under an abstract name: the kernel closes it
however a process ends. It carries the page of the Tally one way when somebody calls, and later why the engine died.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable

from nonet.errors import ConfigError, EngineDeadError

_LONGEST = 1 << 15
_CALL_S = 10.0
_STARTER_ENDED = "the process that started the engine ended"


def _address(name: str) -> str:
    return f"\0{name}-line"


class Switchboard:
    """The starter's side. Takes calls of front ends 1 to `front_ends` - 1, once each; `gone(i)` when one hung up."""

    def __init__(self, name: str, front_ends: int, page: int, gone: Callable[[int], None]) -> None:
        self._numbers, self._page, self._gone = set(range(1, front_ends)), os.dup(page), gone
        self._callers: dict[socket.socket, int] = {}
        self._news: bytes | None = None
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_address(name))
        self._listener.listen(front_ends)
        self._listener.setblocking(False)
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="nonet-switchboard")
        self._thread.start()

    def tell(self, news: str) -> None:
        """The engine is dead: tell all that are on the line, and those that will call."""
        with self._lock:
            self._news = news.encode()[:_LONGEST]
            for caller in self._callers:
                self._send(caller, self._news)

    def close(self) -> None:
        self._waker.close()
        self._thread.join()
        for each in (self._listener, self._wake, *self._callers):
            each.close()
        os.close(self._page)

    def _serve(self) -> None:
        """Thread: take calls and notice who hangs up, until closed."""
        poll = selectors.DefaultSelector()
        poll.register(self._listener, selectors.EVENT_READ)
        poll.register(self._wake, selectors.EVENT_READ)
        with poll:
            while True:
                for ready, _ in poll.select():
                    if ready.fileobj is self._wake:
                        return
                    if ready.fileobj is self._listener:
                        with contextlib.suppress(OSError):  # the caller is gone again
                            poll.register(self._listener.accept()[0], selectors.EVENT_READ)
                    elif not self._hear(ready.fileobj):  # type: ignore[arg-type]
                        poll.unregister(ready.fileobj)
                        self._hang_up(ready.fileobj)  # type: ignore[arg-type]

    def _hear(self, caller: socket.socket) -> bool:
        """A caller says its number, and later nothing but that it is gone (False)."""
        try:
            said = caller.recv(64)
        except OSError:
            return False
        if caller in self._callers or not said.isdigit():
            return False
        number = int(said)
        with self._lock:
            if number not in self._numbers:
                self._send(caller, b"refused")
                return False
            self._numbers.remove(number)
            self._callers[caller] = number
            with contextlib.suppress(OSError):  # it is gone again: the next read says so
                socket.send_fds(caller, [b"welcome"], [self._page])
            if self._news is not None:
                self._send(caller, self._news)
        return True

    def _hang_up(self, caller: socket.socket) -> None:
        with self._lock:
            number = self._callers.pop(caller, None)
        caller.close()
        if number is not None:
            self._gone(number)

    @staticmethod
    def _send(caller: socket.socket, what: bytes) -> None:
        with contextlib.suppress(OSError):  # gone or deaf: it must not hold up the others
            caller.send(what, socket.MSG_DONTWAIT)


class Line:
    """An attached front end's side. Raises EngineDeadError if nobody answers, ConfigError if the number is taken."""

    def __init__(self, name: str, number: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_CALL_S)
        try:
            self._socket.connect(_address(name))
            self._socket.send(str(number).encode())
            said, fds, _, _ = socket.recv_fds(self._socket, 64, 1)
        except OSError as error:
            self._socket.close()
            raise EngineDeadError(f"{_STARTER_ENDED} ({error.strerror or error})") from error
        if said == b"refused":
            self._socket.close()
            raise ConfigError("front_end", number, "was not offered by the engine, or is attached already")
        if not fds:
            self._socket.close()
            raise EngineDeadError(_STARTER_ENDED)
        self.page = fds[0]
        self._socket.settimeout(None)

    def news(self) -> EngineDeadError:
        """Blocks until the engine is dead, its starter is gone, or the line is closed here."""
        try:
            said = self._socket.recv(_LONGEST)
        except OSError:
            said = b""
        return EngineDeadError(said.decode(errors="ignore") or _STARTER_ENDED)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
