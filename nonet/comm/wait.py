"""Bounded waiting on memory that another process writes. No wait in nonet is without an end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from nonet.errors import CommTimeout

_SPINS = 2000  # polls with a bare yield before sleeping: the ranks of one host often share cores
_NAP_S = 50e-6
_lock = threading.Lock()


def fence() -> None:
    """Order memory accesses before against those after, also on processors that reorder stores (not x86).

    Two lock cycles: what stands before cannot sink below the first release, nor what follows rise above the
    second acquire.
    """
    for _ in range(2):
        _lock.acquire()
        _lock.release()


def wait_until(
    arrived: Callable[[], bool], what: str, timeout_s: float, missing: Callable[[], Sequence[int]]
) -> None:
    """Poll until `arrived()`. Raises CommTimeout naming `missing()` after `timeout_s` seconds."""
    for _ in range(_SPINS):
        if arrived():
            fence()
            return
        os.sched_yield()
    deadline = time.monotonic() + timeout_s
    while not arrived():
        if time.monotonic() > deadline:
            raise CommTimeout(what, timeout_s, missing())
        time.sleep(_NAP_S)
    fence()
