"""The parent's end of an A/B comparison: a `Side` is one engine in a process of its own.

Used by `cpu_engine.py`. Knows processes, pipes, clocks and what must be cleaned up (every process that
the side started, the shared memory they map); it must not know any engine. Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TICK = os.sysconf("SC_CLK_TCK")
MARK = "NONET_BENCHMARK_SIDE"
ORDER_S = 120.0  # one run
CLOSE_S = 20.0  # a polite end, before the impolite one


class SideFailed(RuntimeError):
    """A side did not start, answered with an error, or took too long."""


def stat_of(pid: int | str) -> list[str]:
    """/proc/PID/stat from the process state on; all of a zombie's, none of a process that is gone."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return []


def owned_pids(session: int, mark: str) -> list[int]:
    """Living processes of a session, and those elsewhere whose environment holds `mark`.

    Each alone would miss some: an engine may give its ranks sessions of their own, and setproctitle writes over
    the environment that the kernel shows.
    """
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        stat = stat_of(entry)
        if not stat or stat[0] == "Z":
            continue
        owned = int(stat[3]) == session
        with contextlib.suppress(OSError):  # it has ended, or belongs to someone else
            owned = owned or mark.encode() in Path("/proc", entry, "environ").read_bytes()
        if owned:
            found.append(int(entry))
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU seconds used so far by these processes."""
    stats = [stat for stat in map(stat_of, pids) if stat]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICK


def machine_cpu_s() -> float:
    """CPU seconds used so far by everything on this machine."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / TICK


def shared_memory_of(pids: list[int]) -> set[str]:
    """Files in /dev/shm that these processes map or name: theirs to remove once they have ended."""
    inodes: set[int] = set()
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path("/proc", str(pid), "maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/dev/shm/"):
                    inodes.add(int(fields[4]))
        # Intel's OpenMP keeps a file that it does not map for long, and leaves it when it is killed
        found |= set(glob.glob(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_*"))
    for path in glob.glob("/dev/shm/*"):  # by inode: a semaphore is mapped under a name that it no longer has
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino in inodes:
                found.add(path)
    return found


class Side:
    """One engine behind a pipe. `wait_ready` and `run` have time limits; `end` leaves nothing behind."""

    def __init__(self, name: str, python: str, worker: str, options: dict[str, Any], env: dict[str, str], log: Path):
        self.name, self.log = name, log
        self.about: dict[str, Any] = {}
        self.mark = f"{MARK}={uuid.uuid4().hex}"  # inherited by every process that the side starts
        self.buffer = b""
        self.shared: set[str] = set()
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                [python, str(HERE / worker), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=env | dict([self.mark.split("=")]),
                cwd=log.parent,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its sides
            )

    def pids(self) -> list[int]:
        return owned_pids(self.process.pid, self.mark)

    def cpu_s(self) -> float:
        return cpu_s(self.pids())

    def wait_ready(self, limit_s: float) -> None:
        self.about = self.reply(limit_s, "start")["ready"]
        self.shared |= shared_memory_of(self.pids())

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """One batch of requests, given at once: {"seconds", "output_tokens", "first"}."""
        self.tell({"prompts": prompts, "max_tokens": max_tokens})
        result = self.reply(ORDER_S, "run")
        wanted = len(prompts) * max_tokens
        if result["output_tokens"] != wanted:
            raise SideFailed(f"{self.name}: {result['output_tokens']} output tokens instead of {wanted}")
        return result

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as e:
            raise SideFailed(f"{self.name}: its worker has ended ({e})\n{self.last_words()}") from None

    def reply(self, limit_s: float, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        until = time.monotonic() + limit_s
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise SideFailed(f"{self.name}: {what} took more than {limit_s:.0f} s\n{self.last_words()}")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise SideFailed(f"{self.name}: its worker ended during {what}\n{self.last_words()}")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise SideFailed(f"{self.name}: {message['error']}\n{self.last_words()}")
        return message

    def last_words(self, lines: int = 30) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"  {self.name}| {line}" for line in text)

    def pause(self) -> None:
        self.signal_all(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal_all(signal.SIGCONT)

    def signal_all(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, politely: bool) -> None:
        """Ends every process of the side and removes the shared memory they leave behind."""
        self.go_on()
        self.shared |= shared_memory_of(self.pids())
        try:
            if politely and self.process.poll() is None:
                self.tell({"close": True})
                self.process.wait(CLOSE_S)
        except (SideFailed, subprocess.TimeoutExpired):
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        until = time.monotonic() + 10
        while self.pids() and time.monotonic() < until:
            self.signal_all(signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # an order that was never read
                    pipe.close()
        for path in self.shared:
            Path(path).unlink(missing_ok=True)
