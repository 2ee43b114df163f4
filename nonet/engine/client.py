"""The front end's side of the engine: starts the ranks, sends sequences to them, hands back what they send.

Used by LLM and AsyncLLM. Two threads: one receives from ranks, one listens to the supervisor. When a rank ends, every
open sequence gets an error that names it. Knows no text and no tensors.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import logging
import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Sequence

import msgspec
import zmq

from nonet import errors
from nonet.config.checkpoint import ModelSpec, read_spec
from nonet.config.env import rank_environment
from nonet.config.resolve import resolve
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.errors import CapacityError, CommTimeout, EngineDeadError, NonetError, RequestError
from nonet.launch.local import Node

Sink = Callable[[m.Chunk | NonetError], None]
log = logging.getLogger("nonet")
_POLL_MS = 200
_STOP_S = 5.0
_FAILED_GRACE_S = 1.0  # a failing rank's own words may arrive after the news of its end


class Client:
    """A running engine. `close()` (or leaving a `with` block) ends every process; so does the end of this one."""

    def __init__(self, config: EngineConfig) -> None:
        self.spec: ModelSpec = read_spec(config.model.model)
        self.config = resolve(config, self.spec, num_gpus=_num_gpus(config))
        if self.config.moe.routing_simulation:
            strategy = self.config.moe.routing_simulation
            warnings.warn(f"routing is simulated ({strategy}): outputs are meaningless", stacklevel=3)
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._pending = [0] * self.config.parallel.data_parallel_size  # tokens sent and not yet brought back
        self._turn = itertools.count()
        self._error: NonetError | None = None
        self._closing = False
        self._ready: dict[int, m.Ready] = {}
        self._stats: dict[int, list[m.Stats]] = {}
        self._changed = threading.Condition(self._lock)
        name = f"nonet-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._context = zmq.Context()
        self._from_ranks: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._from_ranks.setsockopt(zmq.RCVHWM, 0)
        self._from_ranks.bind(f"ipc://@{name}-out")  # abstract: no file is left behind
        self._to_rank: list[zmq.Socket[bytes]] = [self._context.socket(zmq.PUSH) for _ in range(self.config.world_size)]
        for rank, socket in enumerate(self._to_rank):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://@{name}-in-{rank}")
        payload = {
            "config": self.config.model_dump(),
            "outputs": f"ipc://@{name}-out",
            "inputs": f"ipc://@{name}-in",
        }
        self._node = Node("nonet.engine.core:main", self.config.world_size, payload, rank_environment(self.config))
        self._leash = weakref.finalize(self, self._node.close)
        self._threads = [
            threading.Thread(target=target, daemon=True, name=f"nonet-{target.__name__.strip('_')}")
            for target in (self._receive, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, sequences: Sequence[m.Add], sink: Sink, dp_rank: int | None = None) -> int:
        """Send the sequences of a request to one data-parallel rank and return it; `sink` gets every chunk.

        Without `dp_rank` the rank with the fewest tokens outstanding is taken. Raises EngineDeadError.
        """
        with self._lock:
            self._check_alive()
            if dp_rank is None:
                turn = next(self._turn)
                size = len(self._pending)
                dp_rank = min(range(size), key=lambda r: (self._pending[r], (r - turn) % size))
            elif not 0 <= dp_rank < len(self._pending):
                raise RequestError("data_parallel_rank", dp_rank, f"ranks are 0 to {len(self._pending) - 1}")
            for sequence in sequences:
                if sequence.request_id in self._open:
                    raise RequestError("request_id", sequence.request_id, "is in use; give another")
            for sequence in sequences:
                tokens = len(sequence.tokens) + sequence.max_tokens
                self._open[sequence.request_id] = _Open(sink, dp_rank, tokens, len(sequence.tokens))
                self._pending[dp_rank] += tokens
                self._send(dp_rank * self.config.parallel.tensor_parallel_size, sequence)
            return dp_rank

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget sequences; those that are done already are ignored. A sink's last chunk says "abort"."""
        with self._lock:
            forgotten = {request_id: self._forget(request_id) for request_id in request_ids}
            here = {request_id: entry for request_id, entry in forgotten.items() if entry is not None}
            for dp_rank in {entry.dp_rank for entry in here.values()}:
                ids = [request_id for request_id, entry in here.items() if entry.dp_rank == dp_rank]
                self._send(dp_rank * self.config.parallel.tensor_parallel_size, m.Abort(ids))
        for request_id, entry in here.items():
            entry.give(m.Chunk(request_id, [], finish_reason="abort"))

    def stats(self, reset_load: bool = False, timeout_s: float = 30.0) -> list[m.Stats]:
        """Every rank's counters, in rank order. Raises EngineDeadError or CommTimeout."""
        with self._lock:
            self._check_alive()
            number = next(self._turn)
            self._stats[number] = []
            for rank in range(self.config.world_size):
                self._send(rank, m.GetStats(number, reset_load))
            try:
                came = self._stats[number]
                self._wait(lambda: {s.rank for s in came}, timeout_s, "stats")
                return sorted(came, key=lambda s: s.rank)
            finally:
                del self._stats[number]

    @property
    def pending(self) -> list[int]:
        """Tokens outstanding on each data-parallel rank."""
        with self._lock:
            return list(self._pending)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return [self._ready[rank].pid for rank in sorted(self._ready)]

    @property
    def supervisor_pid(self) -> int:
        """Process id of what started the ranks and watches them."""
        return self._node.pid

    @property
    def ready(self) -> list[m.Ready]:
        """What each rank reported at its start."""
        return [self._ready[rank] for rank in sorted(self._ready)]

    # -- inside --------------------------------------------------------------------------------------------------

    def _send(self, rank: int, message: m.ToRank) -> None:
        with contextlib.suppress(zmq.Again):  # the rank is gone: the supervisor's news will end what is open
            self._to_rank[rank].send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self, came: Callable[[], set[int]], timeout_s: float, what: str) -> None:
        """Wait, holding the lock, until all ranks came; ends early if the engine dies."""
        ranks = set(range(self.config.world_size))
        if not self._changed.wait_for(lambda: came() == ranks or self._error is not None, timeout_s):
            raise CommTimeout(what, timeout_s, sorted(ranks - came()))
        if self._error is not None:
            raise self._error

    def _await_ready(self) -> None:
        with self._lock:
            limit = self.config.runtime.startup_timeout_s
            self._wait(lambda: set(self._ready), limit, "start of the ranks")

    def _forget(self, request_id: str) -> _Open | None:
        done = self._open.pop(request_id, None)
        if done is not None:
            self._pending[done.dp_rank] -= done.pending
        return done

    def _receive(self) -> None:
        """Thread: take messages from ranks until closing."""
        decoder = msgspec.msgpack.Decoder(m.FromRank)
        while not self._closing:
            if self._from_ranks.poll(_POLL_MS):
                self._handle(decoder.decode(self._from_ranks.recv()))

    def _handle(self, message: m.FromRank) -> None:
        match message:
            case m.Chunks():
                for chunk in message.chunks:
                    self._hand_out(chunk)
            case m.Refused():
                error: NonetError = RequestError("request", message.request_id, "; ".join(message.arguments))
                if message.kind == "CapacityError":
                    error = CapacityError(*message.arguments)
                elif message.kind == "RequestError":
                    error = RequestError(*message.arguments)
                with self._lock:
                    refused = self._forget(message.request_id)
                if refused is not None:
                    refused.give(error)
            case m.Failed():
                self._fail(_rebuild(message))
            case m.Ready():
                with self._lock:
                    self._ready[message.rank] = message
                    self._changed.notify_all()
            case m.Stats():
                with self._lock:
                    if message.number in self._stats:
                        self._stats[message.number].append(message)
                    self._changed.notify_all()

    def _hand_out(self, chunk: m.Chunk) -> None:
        with self._lock:
            entry = self._open.get(chunk.request_id)
            if entry is None:
                return  # aborted meanwhile
            came = len(chunk.tokens) + entry.prompt
            entry.prompt = 0
            entry.pending -= came
            self._pending[entry.dp_rank] -= came
            if chunk.finish_reason is not None:
                self._forget(chunk.request_id)
        entry.give(chunk)

    def _watch(self) -> None:
        """Thread: hear from the supervisor until it ends."""
        news = EngineDeadError("the supervisor of the ranks ended")
        while (event := self._node.next_event()) is not None:
            if event["event"] == "died":
                news = EngineDeadError(f"rank {event['rank']} died ({event['how']})")
                if event["how"].startswith("exit"):
                    with self._lock:
                        self._changed.wait_for(lambda: self._error is not None, _FAILED_GRACE_S)
                self._fail(news)
        self._fail(news)

    def _fail(self, error: NonetError) -> None:
        """The engine is dead: tell every open sequence, once."""
        with self._lock:
            if self._error is not None or self._closing:
                return
            self._error = error
            entries = list(self._open.values())
            self._open.clear()
            self._changed.notify_all()
        for entry in entries:
            entry.give(error)

    def close(self) -> None:
        """End all ranks; open sequences get an error. Returns when every process is gone."""
        with self._lock:
            if self._closing:
                return
            alive = self._error is None and len(self._ready) == self.config.world_size
            if alive:
                for rank in range(self.config.world_size):
                    self._send(rank, m.Stop())
        self._fail(EngineDeadError("the engine is closed"))
        if alive:
            self._threads[1].join(_STOP_S)
        self._closing = True
        self._leash()
        for thread in self._threads:
            thread.join(_STOP_S)
        self._context.destroy(linger=0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Open:
    """A sequence in flight."""

    __slots__ = ("dp_rank", "pending", "prompt", "sink")

    def __init__(self, sink: Sink, dp_rank: int, pending: int, prompt: int) -> None:
        self.sink, self.dp_rank, self.pending, self.prompt = sink, dp_rank, pending, prompt

    def give(self, item: m.Chunk | NonetError) -> None:
        """Hand over; a receiver that is gone (its event loop closed) must not stop those that are there."""
        try:
            self.sink(item)
        except RuntimeError as error:
            log.warning("nobody takes what came for a request: %s", error)


def _rebuild(failed: m.Failed) -> NonetError:
    """The error a rank raised, or EngineDeadError with its words, naming the rank."""
    kind = getattr(errors, failed.kind, EngineDeadError)
    if failed.kind in ("ConfigError", "RequestError") and len(failed.arguments) == 3:
        return kind(*failed.arguments)
    if failed.kind == "ModelError":
        return errors.ModelError(failed.text)
    return EngineDeadError(f"rank {failed.rank}: {failed.text}")


def _num_gpus(config: EngineConfig) -> int:
    """GPUs this process may use; asks torch only where there is a driver."""
    if config.parallel.device == "cpu" or not glob.glob("/dev/nvidia[0-9]*"):
        return 0
    import torch

    return torch.cuda.device_count()


