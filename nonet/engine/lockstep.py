"""The step exchange: before each step every rank learns what every other has to do, over shared memory.

Used by the engine's loop; never touches the compute stream or a collective. All ranks of one host. Each rank has a
mailbox with two pages that alternate by step: a rank writes page n + 1 only after it has read everyone's n, so two
are enough. When nobody has work all fall asleep together, and the first that gets some wakes the others by a
datagram that carries the number of the sleep, so that late ones are recognised.
"""

from __future__ import annotations

import os
import socket

import zmq

from nonet.comm.group import Group
from nonet.comm.peer import Windows, align
from nonet.comm.wait import fence, wait_until

_HEADER = 64


class Lockstep:
    """One rank's side of the exchange. `page_bytes` bounds a message."""

    def __init__(self, group: Group, page_bytes: int, timeout_s: float) -> None:
        self.group, self.page_bytes, self.timeout_s = group, align(page_bytes), timeout_s
        self.steps = self.sleeps = 0
        windows = Windows(group, _HEADER + 2 * self.page_bytes)
        self._flags = [windows.words(r, 0, 3) for r in range(group.size)]  # step, length of page 0, of page 1
        self._pages = [memoryview(memory)[_HEADER:] for memory in windows.memory]
        self._wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wake.bind("")  # an abstract address chosen by the kernel: nothing is left behind
        self._wake.setblocking(False)
        self._others = [a for a in group.all_gather_object(self._wake.getsockname()) if a != self._wake.getsockname()]

    def exchange(self, message: bytes) -> list[bytes]:
        """Everyone's message of this step, in rank order. Raises CommTimeout naming the ranks that did not come."""
        assert len(message) <= self.page_bytes, f"a step message of {len(message)} bytes exceeds {self.page_bytes}"
        self.steps += 1
        step, page = self.steps, self.steps % 2
        first = page * self.page_bytes
        own = self._flags[self.group.rank]
        self._pages[self.group.rank][first : first + len(message)] = message
        own[1 + page] = len(message)
        fence()
        own[0] = step
        wait_until(
            lambda: all(flags[0] >= step for flags in self._flags),
            "step exchange",
            self.timeout_s,
            lambda: [self.group.ranks[r] for r, flags in enumerate(self._flags) if flags[0] < step],
        )
        return [bytes(p[first : first + f[1 + page]]) for p, f in zip(self._pages, self._flags, strict=True)]

    def fall_asleep(self) -> None:
        """Enter the sleep that all ranks agreed on in the exchange just made."""
        self.sleeps += 1

    def doze(self, inbox: zmq.Socket[bytes]) -> bool:
        """Block until the inbox has something (False) or another rank woke us from this sleep (True).

        Not bounded: an idle server waits for its next request. The supervisor ends ranks whose peers are gone.
        """
        poller = zmq.Poller()
        poller.register(inbox, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        ready = dict(poller.poll())
        if self._wake.fileno() not in ready and self._wake not in ready:
            return False
        try:
            while True:
                if int(self._wake.recv(32)) == self.sleeps:
                    return True
        except BlockingIOError:
            return False

    def wake_others(self) -> None:
        """Tell every other rank that the current sleep is over."""
        for address in self._others:
            try:
                self._wake.sendto(str(self.sleeps).encode(), address)
            except (ConnectionRefusedError, BlockingIOError):
                # gone: the supervisor says so; or its queue is full of wakes, and it is about to read one
                continue

    def close(self) -> None:
        self._wake.close()


def own_cpu_seconds() -> float:
    """Processor time this rank has used."""
    times = os.times()
    return times.user + times.system
