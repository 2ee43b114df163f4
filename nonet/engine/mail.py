"""The sockets between front ends and ranks: both ends of every address, so that they cannot disagree.

Used by `front_end` and `core`. A rank binds one inbox for all front ends, a front end binds one for all ranks; the
names are abstract (no file is left behind). Sending never blocks: what is for somebody who is gone is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import zmq

from nonet.engine import messages as m

STARTER = 0  # the number of the front end that started the ranks


def _to_rank(name: str, rank: int) -> str:
    return f"ipc://@{name}-to-rank-{rank}"


def _to_front_end(name: str, number: int) -> str:
    return f"ipc://@{name}-to-front-end-{number}"


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    return socket


class FrontEndMail:
    """One front end's sockets. `name` is the engine's. Sending from one thread at a time, receiving from another."""

    def __init__(self, name: str, number: int) -> None:
        self._name = name
        self._context = zmq.Context()
        self._inbox = _socket(self._context, zmq.PULL)
        self._inbox.bind(_to_front_end(name, number))
        self._ranks: list[zmq.Socket[bytes]] = []
        self._decoder = msgspec.msgpack.Decoder(m.FromRank)

    def connect(self, num_ranks: int) -> None:
        """Once the ranks are there."""
        for rank in range(num_ranks):
            socket = _socket(self._context, zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(_to_rank(self._name, rank))
            self._ranks.append(socket)

    @property
    def connected(self) -> bool:
        return bool(self._ranks)

    def send(self, rank: int, message: m.ToRank) -> None:
        with contextlib.suppress(zmq.Again):  # the rank is gone: the supervisor's news will end what is open
            self._ranks[rank].send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def receive(self, timeout_ms: int) -> m.FromRank | None:
        """The next message of any rank; None if there is none for so long."""
        self._inbox.rcvtimeo = timeout_ms
        try:
            return self._decoder.decode(self._inbox.recv())
        except zmq.Again:
            return None

    def close(self) -> None:
        self._context.destroy(linger=0)


class RankMail:
    """One rank's sockets: an inbox, and one to each front end that was ever heard of."""

    def __init__(self, name: str, rank: int) -> None:
        self._name = name
        self._context = zmq.Context()
        self.inbox = _socket(self._context, zmq.PULL)
        self.inbox.bind(_to_rank(name, rank))
        self._outboxes: dict[int, zmq.Socket[bytes] | None] = {}  # None: its front end is gone
        self._decoder = msgspec.msgpack.Decoder(m.ToRank)

    def arrived(self) -> Iterator[m.ToRank]:
        """All that is here now."""
        with contextlib.suppress(zmq.Again):
            while True:
                yield self._decoder.decode(self.inbox.recv(zmq.NOBLOCK))

    def send(self, front_end: int, message: m.FromRank) -> None:
        if front_end not in self._outboxes:
            outbox = self._outboxes[front_end] = _socket(self._context, zmq.PUSH)
            outbox.connect(_to_front_end(self._name, front_end))
        found = self._outboxes[front_end]
        if found is not None:
            found.send(msgspec.msgpack.encode(message))

    def forget(self, front_end: int) -> None:
        """It is gone, for good: nothing more is kept for it."""
        outbox = self._outboxes.get(front_end)
        self._outboxes[front_end] = None
        if outbox is not None:
            outbox.close(linger=0)

    def is_forgotten(self, front_end: int) -> bool:
        return front_end in self._outboxes and self._outboxes[front_end] is None

    def close(self) -> None:
        """Returns when what was sent last has left, or a second later."""
        self._context.destroy(linger=1000)
