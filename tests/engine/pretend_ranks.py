"""Pretend ranks and their supervisor for tests of the front end's client, in this process and scripted by the test."""

from __future__ import annotations

import queue
import threading
import time

import msgspec
import zmq

from nonet.engine import messages as m
from nonet.types import SamplingParams

SOON_S = 5.0


class PretendNode:
    """Stands in for the ranks and their supervisor: records what arrives, says what a test wants it to say."""

    latest: PretendNode
    silent: tuple[int, ...] = ()  # ranks that never become ready
    first_words: m.Failed | None = None  # said instead of being ready

    def __init__(self, entry, num_ranks, payload, env) -> None:
        type(self).latest = self
        self.payload, self.pid, self.events = payload, 4242, queue.Queue()
        self.received: list[list[m.ToRank]] = [[] for _ in range(num_ranks)]
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PUSH)
        self._out.connect(payload["outputs"])
        self._in = [self._context.socket(zmq.PULL) for _ in range(num_ranks)]
        for rank, inbox in enumerate(self._in):
            inbox.connect(f"{payload['inputs']}-{rank}")
            if self.first_words is None and rank not in self.silent:
                self.say(m.Ready(rank, 1000 + rank, num_blocks=8, bytes_read=rank))
        if self.first_words is not None:
            self.say(self.first_words)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        decode = msgspec.msgpack.Decoder(m.ToRank).decode
        while not self._closed.is_set():
            for rank, inbox in enumerate(self._in):
                while inbox.poll(2):
                    self.received[rank].append(decode(inbox.recv()))
            if all(any(isinstance(x, m.Stop) for x in one) for one in self.received):
                self.events.put(None)  # told to stop, the ranks leave and the supervisor ends
                return

    def say(self, message: m.FromRank) -> None:
        self._out.send(msgspec.msgpack.encode(message))

    def next_event(self):
        return self.events.get()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self.events.put(None)
            self._thread.join()
            self._context.destroy(linger=0)

    def wait_for(self, rank: int, kind: type, count: int = 1) -> list:
        """The messages of a kind that a rank got, once there are so many."""

        def found() -> list:
            return [message for message in self.received[rank] if isinstance(message, kind)]

        eventually(lambda: len(found()) >= count)
        return found()


def eventually(holds) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def request(name: str = "a", prompt: int = 3, max_tokens: int = 5) -> m.Add:
    return m.Add(name, list(range(prompt)), SamplingParams(), max_tokens, seed=0)


class Sink:
    """Takes what a sequence gets; `next()` waits for it."""

    def __init__(self) -> None:
        self.items: queue.Queue = queue.Queue()

    def __call__(self, item) -> None:
        self.items.put(item)

    def next(self):
        return self.items.get(timeout=SOON_S)

    def nothing_more(self) -> bool:
        return self.items.empty()
