"""Whether processes have ended. One may do so between any two looks at it, so every look allows for that."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil


def living(pids: Sequence[int], within_s: float = 10.0, zombies: bool = False) -> list[int]:
    """Those of `pids` that have not ended `within_s` seconds from now. A zombie has, unless `zombies` count."""
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if _lives(pid, zombies)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def _lives(pid: int, zombies: bool) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE or zombies
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
