"""Runs a function on several ranks at once and hands back what each returned. For tests and benchmarks.

`run_ranks` starts ranks, runs one function and ends them; a `Cluster` keeps its ranks for many runs. Every wait ends:
an error on a rank is raised here with the rank's traceback, a rank that dies or hangs is named. After a failure the
ranks may be out of step with each other, so the next run starts fresh ones. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
import traceback
import uuid
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import zmq

from nonet.comm.world import World
from nonet.config.place import Place
from nonet.errors import CommError, CommTimeout, EngineDeadError
from nonet.launch.local import Node

Function = str | Callable[..., Any]  # "module:function", or a callable at its module's top level
_POLL_MS = 50
_START_S = 120.0
_STOP_S = 5.0
_REST_S = 1.0  # after one rank failed, how long to listen for what the others say


def run_ranks(
    size: int,
    function: Function,
    *args: Any,
    timeout_s: float = 60.0,
    device: str = "cpu",
    tensor_parallel_size: int = 1,
    comm_timeout_s: float | None = None,
) -> list[Any]:
    """Call function(world, *args) on `size` new ranks; the results in rank order. Errors as `Cluster.run`."""
    cluster = Cluster(
        size,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        timeout_s=timeout_s,
        comm_timeout_s=comm_timeout_s,
    )
    with cluster:
        return cluster.run(function, *args)


class Cluster:
    """Ranks that are started once and run many functions. On "cuda" each has a GPU of its own.

    `timeout_s` bounds a run, `comm_timeout_s` (default: half of it) each wait of a rank for the others.
    """

    def __init__(
        self,
        size: int,
        *,
        tensor_parallel_size: int = 1,
        device: str = "cpu",
        timeout_s: float = 60.0,
        comm_timeout_s: float | None = None,
    ) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._payload = {
            "device": device,
            "tensor_parallel_size": tensor_parallel_size,
            "timeout_s": timeout_s / 2 if comm_timeout_s is None else comm_timeout_s,
        }
        self._ranks: _Ranks | None = _Ranks(size, self._payload)

    def run(self, function: Function, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call function(world, *args) on every rank; the results in rank order.

        Raises the error of the rank that failed first, with that rank's number and traceback as a note; EngineDeadError
        if a rank died; CommTimeout naming the ranks that did not answer in time.
        """
        if self._ranks is None:
            self._ranks = _Ranks(self.size, self._payload)
        try:
            return self._ranks.run(_name(function), args, self.timeout_s if timeout_s is None else timeout_s)
        except BaseException:
            self._ranks.kill()
            self._ranks = None
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the supervisor and, once a run has waited for them, the ranks."""
        return [] if self._ranks is None else [self._ranks.node.pid, *self._ranks.pids]

    def close(self) -> None:
        """End the ranks; returns when their processes are gone."""
        if self._ranks is not None:
            self._ranks.stop()
            self._ranks = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Ranks:
    """One generation of processes and the sockets to them."""

    def __init__(self, size: int, payload: dict[str, Any]) -> None:
        self.size, self.number, self.pids = size, 0, []  # type: ignore[var-annotated]
        self._news: dict[str, Any] | None = None  # how the first rank, or the supervisor, ended
        name = f"ipc://@nonet-test-{os.getpid()}-{uuid.uuid4().hex[:12]}"  # abstract: no file is left behind
        self._context = zmq.Context()
        self._answers: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._answers.bind(f"{name}-out")
        self._jobs: list[zmq.Socket[bytes]] = [self._context.socket(zmq.PUSH) for _ in range(size)]
        for rank, socket in enumerate(self._jobs):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDTIMEO, 1000)  # a socket whose rank is gone would block for ever
            socket.bind(f"{name}-in-{rank}")
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.node = Node("nonet.testing.cluster:main", size, {**payload, "name": name}, env)
        self._leash = weakref.finalize(self, self.node.close)
        self._watcher = threading.Thread(target=self._watch, args=(self.node,), daemon=True, name="nonet-cluster-watch")
        self._watcher.start()

    def _watch(self, node: Node) -> None:
        """Thread: hear from the supervisor until it ends."""
        while (event := node.next_event()) is not None:
            if event["event"] == "started":
                self.pids = event["pids"]
            elif event["event"] == "died":
                self._news = self._news or event
        self._news = self._news or {"event": "ended"}

    def run(self, function: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        if self.number == 0:
            self._collect("start of the ranks", _START_S)
        self.number += 1
        job = pickle.dumps((self.number, function, args, sys.path))
        self._send(job)
        return self._collect(function, timeout_s)

    def _send(self, job: bytes) -> None:
        """Give every rank a job. Who cannot take it is gone, and will be missed when answers are collected."""
        for socket in self._jobs:
            with contextlib.suppress(zmq.Again):
                socket.send(job)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        """Every rank's answer to the current job. Raises what `Cluster.run` says."""
        answers: dict[int, Any] = {}
        failures: list[tuple[int, bytes, str]] = []
        deadline = time.monotonic() + timeout_s
        while len(answers) + len(failures) < self.size and time.monotonic() < deadline:
            if self._answers.poll(_POLL_MS):
                rank, number, ok, value = pickle.loads(self._answers.recv())
                if number != self.number:
                    continue
                if ok:
                    answers[rank] = pickle.loads(value)
                else:
                    failures.append((rank, *value))
                    deadline = min(deadline, time.monotonic() + _REST_S)
            elif self._news is not None:
                break  # the supervisor has ended the others too
        error = _first(failures, self.size)
        if self._news is not None and (error is None or isinstance(error, CommError)):  # else: what others saw of it
            end = (
                f"rank {self._news['rank']} died ({self._news['how']})" if "rank" in self._news else "supervisor ended"
            )
            raise EngineDeadError(f"{what}: {end}")
        if error is not None:
            raise error
        if len(answers) < self.size:
            raise CommTimeout(what, timeout_s, [r for r in range(self.size) if r not in answers])
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """Let idle ranks leave in order, then make sure."""
        if self._news is None:
            self._send(b"")
            self._watcher.join(_STOP_S)
        self.kill()

    def kill(self) -> None:
        self._leash()
        self._watcher.join(_STOP_S)
        self._context.destroy(linger=0)


def _first(failures: list[tuple[int, bytes, str]], size: int) -> BaseException | None:
    """One rank's error: the first that is not merely the echo of another rank's failure."""
    if not failures:
        return None
    loaded = [(rank, _load_error(error, text), text) for rank, error, text in failures]
    rank, error, text = next((f for f in loaded if not isinstance(f[1], CommError)), loaded[0])
    others = [r for r, _, _ in loaded if r != rank]
    also = f" (rank(s) {', '.join(map(str, others))} failed too)" if others else ""
    error.add_note(f"on rank {rank} of {size}{also}:\n{text}")
    return error


def _load_error(pickled: bytes, text: str) -> BaseException:
    try:
        error = pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - an error of any class may refuse to be rebuilt; its words are in the traceback
        error = None
    if isinstance(error, BaseException):
        return error
    return EngineDeadError(text.strip().splitlines()[-1])


def _name(function: Function) -> str:
    """ "module:function", by which ranks import it."""
    if isinstance(function, str):
        return function
    module, name = function.__module__, function.__qualname__
    if "." in name:
        raise ValueError(f"{module}.{name} is not at its module's top level, and ranks import it by name")
    if module == "__main__":
        module = Path(sys.modules["__main__"].__file__ or "").stem
    return f"{module}:{name}"


def main(place: Place, payload: dict[str, Any]) -> None:
    """A rank's life: join, then run what comes until told to leave."""
    if payload["device"] == "cpu":  # what a GPU's libraries warn of is not ours to mend
        warnings.simplefilter("error")
        # NumPy's, of how Triton's interpreter reads scalars
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"triton\.runtime\.interpreter")
    torch.set_num_threads(1)
    context = zmq.Context()
    inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
    inbox.connect(f"{payload['name']}-in-{place.rank}")
    outbox: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    outbox.connect(f"{payload['name']}-out")
    try:
        _serve(place, payload, inbox, outbox)
    finally:
        context.destroy(linger=1000)


def _serve(place: Place, payload: dict[str, Any], inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    worlds: list[World] = []

    def join() -> None:
        size, device = payload["tensor_parallel_size"], payload["device"]
        worlds.append(World(place, tensor_parallel_size=size, device=device, timeout_s=payload["timeout_s"]))

    _answer(outbox, place.rank, 0, join)
    while job := inbox.recv():  # not bounded: an idle pool waits for work, and the supervisor ends it with its parent
        number, function, args, path = pickle.loads(job)
        sys.path[:] = path

        def work(function: str = function, args: tuple[Any, ...] = args) -> Any:
            return resolve_name(function)(worlds[0], *args)

        _answer(outbox, place.rank, number, work)
    worlds[0].close()


def _answer(outbox: zmq.Socket[bytes], rank: int, number: int, work: Callable[[], Any]) -> None:
    """Do the work and send its result, or its error as (pickled, traceback)."""
    try:
        ok, value = True, pickle.dumps(work())
    except Exception as error:  # noqa: BLE001 - whatever a rank raises is raised again in the caller
        ok, pickled = False, b""
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(error)
        value = (pickled, traceback.format_exc())  # type: ignore[assignment]
    outbox.send(pickle.dumps((rank, number, ok, value)))
