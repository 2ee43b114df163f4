"""Waiting for memory that another process writes: it ends when the value comes, or in time with who is missing."""

from __future__ import annotations

import threading
import time

import pytest

from nonet.comm import wait
from nonet.comm.wait import fence, wait_until
from nonet.errors import CommTimeout


def never_asked() -> list[int]:
    raise AssertionError("asked who is missing although nobody is")


def test_returns_at_once_if_it_is_there():
    polls = []
    wait_until(lambda: not polls.append(1), "flag", 0.0, never_asked)
    assert len(polls) == 1


@pytest.mark.parametrize("polls", [2, wait._SPINS + 5])  # while spinning, and after the first naps
def test_polls_until_it_is_there(polls):
    left = iter(range(polls, -1, -1))
    wait_until(lambda: next(left) == 0, "flag", 5.0, never_asked)
    assert next(left, None) is None


def test_sees_what_another_thread_writes():
    flag = []
    writer = threading.Timer(0.05, flag.append, [1])
    writer.start()
    start = time.monotonic()
    wait_until(lambda: bool(flag), "flag", 5.0, never_asked)
    assert 0.04 < time.monotonic() - start < 2.0
    writer.join()


def test_ends_in_time_and_names_who_is_missing():
    start = time.monotonic()
    with pytest.raises(CommTimeout) as caught:
        wait_until(lambda: False, "step exchange", 0.2, lambda: [1, 3])
    assert 0.2 <= time.monotonic() - start < 1.0
    assert caught.value.missing == (1, 3)
    assert str(caught.value).startswith("step exchange: rank(s) 1, 3 did not arrive")


def test_long_waits_cost_little():
    """Naps grow with the wait: half a second of waiting polls some hundred times, not thousands."""
    polls = []
    with pytest.raises(CommTimeout):
        wait_until(lambda: bool(polls.append(1)), "flag", 0.5, lambda: [0])
    assert len(polls) < wait._SPINS + 1500


def test_fence_from_many_threads():
    """It is only two lock cycles: it must not deadlock."""
    threads = [threading.Thread(target=lambda: [fence() for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in threads)
