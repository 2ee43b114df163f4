"""Whether processes have ended. One may do so between any two looks at it, so every look allows for that."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil


def living(pids: Sequence[int], within_s: float = 10.0) -> list[int]:
    """Those of `pids` that have not ended `within_s` seconds from now; a zombie has ended."""
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if _lives(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started_by(pid: int, words: str = "") -> list[psutil.Process]:
    """The living processes that `pid` started, and those they started, that have `words` in their command line."""
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if words in _command(p)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
