"""Starts the ranks of one host, watches them, and ends them all when one dies or the caller goes away.

A `Node` (in the front end) starts one supervisor process, which imports the rank's module once and forks a rank
for each place: start-up costs one import, however many ranks. The supervisor's standard input is the leash: when it
closes, however the front end ended, the ranks are killed; if the supervisor is killed, the kernel kills the ranks.
Its standard output carries one JSON line an event. Knows no torch and nothing of what ranks do.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from nonet.config.place import Place
from nonet.errors import NonetError

PR_SET_PDEATHSIG = 1
STOP_GRACE_S = 5.0


class Node:
    """The front end's hold on this host's ranks. `entry` is "module:function", called as f(place, payload).

    `imports` are modules that the supervisor imports beside it, so that ranks have them from the start.
    """

    def __init__(
        self,
        entry: str,
        num_ranks: int,
        payload: Mapping[str, Any],
        env: Mapping[str, str],
        imports: Sequence[str] = (),
    ) -> None:
        order = {"entry": entry, "num_ranks": num_ranks, "payload": dict(payload), "imports": list(imports)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nonet.launch.local import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
            start_new_session=True,  # Ctrl-C goes to the front end, which ends the ranks in order
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    def next_event(self) -> dict[str, Any] | None:
        """Blocks for the supervisor's next event: {"event": "started" | "died" | "done", ...}; None once it ended."""
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except ValueError:  # closed while reading
            return None
        return json.loads(line) if line else None

    def close(self) -> None:
        """End all ranks and the supervisor; returns when they are gone (bounded)."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main() -> None:
    """The supervisor: read the order, fork the ranks, report the first that ends badly, end with the leash."""
    order = json.loads(sys.stdin.buffer.readline())
    module, function = order["entry"].split(":")
    entry = getattr(importlib.import_module(module), function)
    for name in order["imports"]:
        importlib.import_module(name)
    meeting = socket.create_server(("127.0.0.1", 0), backlog=order["num_ranks"] + 8)
    port = meeting.getsockname()[1]
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever ranks print goes to standard error
    ranks: dict[int, int] = {}  # pid -> rank
    supervisor = os.getpid()
    for rank in range(order["num_ranks"]):
        pid = os.fork()
        if pid == 0:
            events.close()
            fd = meeting.detach() if rank == 0 else None
            place = Place(rank, order["num_ranks"], rank, port=port, listen_fd=fd)
            _run_rank(entry, place, order["payload"], supervisor)
        ranks[pid] = rank
    meeting.close()
    with contextlib.suppress(BrokenPipeError):  # whoever started this is gone: the leash says so too
        events.write(json.dumps({"event": "started", "pids": list(ranks)}) + "\n")
    _watch(ranks, events)


def _run_rank(entry: Any, place: Place, payload: dict[str, Any], supervisor: int) -> None:
    """In the child: die with the supervisor, run, and never return."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it ended before the line above
        os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    code = 0
    try:
        entry(place, payload)
    except NonetError:  # told in its own words by the rank
        code = 1
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(ranks: dict[int, int], events: Any) -> None:
    """Until the leash closes or every rank is gone; the first bad end is reported and ends the others."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, _ignore)
    poll = selectors.DefaultSelector()
    poll.register(reader, selectors.EVENT_READ)
    poll.register(0, selectors.EVENT_READ)
    leash = True
    while ranks and leash:
        for rank, status in _reap(ranks):
            if status != 0:
                _report(events, rank, status)
                leash = False
        if not (ranks and leash):
            break
        for key, _ in poll.select():
            if key.fd == reader:
                os.read(reader, 512)
            elif not os.read(0, 512):
                leash = False
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    for pid in ranks:
        os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        events.write(json.dumps({"event": "done"}) + "\n")


def _ignore(number: int, frame: FrameType | None) -> None:
    """SIGCHLD only has to wake the selector."""


def _reap(ranks: dict[int, int]) -> list[tuple[int, int]]:
    """Takes out the ranks that ended: (rank, exit status), the killed first.

    Looks twice, as one may have ended because another did, after that one was looked at.
    """
    ended = []
    for pid in [*ranks, *ranks]:
        done, status = os.waitpid(pid, os.WNOHANG) if pid in ranks else (0, 0)
        if done:
            ended.append((ranks.pop(pid), os.waitstatus_to_exitcode(status)))
    return sorted(ended, key=lambda one: one[1] >= 0)


def _report(events: Any, rank: int, status: int) -> None:
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    with contextlib.suppress(BrokenPipeError):
        events.write(json.dumps({"event": "died", "rank": rank, "how": how}) + "\n")
