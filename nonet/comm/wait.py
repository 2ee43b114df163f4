"""Bounded waiting on memory that another process writes. No wait in nonet is without an end."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence

from nonet.errors import CommTimeout

_SPINS = 50  # polls with a bare yield before napping: the ranks of one host often share cores with others
_NAP_S, _LONGEST_NAP_S, _NAP_SHARE = 20e-6, 1e-3, 0.05  # a nap takes a twentieth of the time waited so far
_PR_SET_TIMERSLACK = 29
_lock = threading.Lock()


def nap_precisely() -> None:
    """Let this thread's short naps end within a microsecond; Linux adds fifty by default."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def fence() -> None:
    """Order memory accesses before against those after, also on processors that reorder stores (not x86).

    Two lock cycles: what stands before cannot sink below the first release, nor what follows rise above the
    second acquire.
    """
    for _ in range(2):
        _lock.acquire()
        _lock.release()


def wait_until(arrived: Callable[[], bool], what: str, timeout_s: float, missing: Callable[[], Sequence[int]]) -> None:
    """Poll until `arrived()`. Raises CommTimeout naming `missing()` after `timeout_s` seconds."""
    for _ in range(_SPINS):
        if arrived():
            fence()
            return
        os.sched_yield()
    start = time.monotonic()
    while not arrived():
        waited = time.monotonic() - start
        if waited > timeout_s:
            raise CommTimeout(what, timeout_s, missing())
        time.sleep(min(max(_NAP_S, waited * _NAP_SHARE), _LONGEST_NAP_S))
    fence()
