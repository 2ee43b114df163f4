"""Pretend ranks and their supervisor for tests of the front end's client, in this process and scripted by the test."""

from __future__ import annotations

import queue
import threading
import time

from nonet.engine import messages as m
from nonet.engine.mail import STARTER, RankMail
from nonet.types import SamplingParams

SOON_S = 5.0


class PretendNode:
    """Stands in for the ranks and their supervisor: records what arrives, says what a test wants it to say."""

    latest: PretendNode
    silent: tuple[int, ...] = ()  # ranks that never become ready
    first_words: m.Failed | None = None  # said instead of being ready

    def __init__(self, entry, num_ranks, payload, env, imports=()) -> None:
        type(self).latest = self
        self.payload, self.pid, self.events = payload, 4242, queue.Queue()
        self.received: list[list[m.ToRank]] = [[] for _ in range(num_ranks)]
        self._mail = [RankMail(payload["name"], rank) for rank in range(num_ranks)]
        for rank in range(num_ranks):
            if self.first_words is None and rank not in self.silent:
                self.say(m.Ready(rank, 1000 + rank, num_blocks=8, bytes_read=rank))
        if self.first_words is not None:
            self.say(self.first_words)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._closed.wait(0.002):
            for mail, received in zip(self._mail, self.received, strict=True):
                received.extend(mail.arrived())
            if all(any(isinstance(x, m.Stop) for x in one) for one in self.received):
                self.events.put(None)  # told to stop, the ranks leave and the supervisor ends
                return

    def say(self, message: m.FromRank, front_end: int = STARTER) -> None:
        self._mail[0].send(front_end, message)

    def say_nonsense(self) -> None:
        self._mail[0]._outboxes[STARTER].send(b"\xc1")

    def next_event(self):
        return self.events.get()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self.events.put(None)
            self._thread.join()
            for mail in self._mail:
                mail.close()

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
    """Takes what sequences get; `next()` waits for it. `calls` are the keys of each call."""

    def __init__(self) -> None:
        self.items: queue.Queue = queue.Queue()
        self.calls: list[list] = []

    def __call__(self, items) -> None:
        self.calls.append([key for key, _ in items])
        for _, item in items:
            self.items.put(item)

    def next(self):
        return self.items.get(timeout=SOON_S)

    def nothing_more(self) -> bool:
        return self.items.empty()
