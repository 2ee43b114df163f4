"""One front end of the engine: sends sequences to ranks, chooses the rank, hands back what ranks send.

`Client` (which starts the ranks) and `Attached` (another process, on the same ranks) are front ends; LLM and AsyncLLM
use them. One thread receives. When the engine dies, every open sequence gets the error. Knows no text and no tensors.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from nonet.config.checkpoint import ModelSpec
from nonet.config.schema import EngineConfig
from nonet.engine import messages as m
from nonet.engine.mail import FrontEndMail
from nonet.engine.tally import Tally
from nonet.errors import CapacityError, CommTimeout, EngineDeadError, NonetError, RequestError

Item = m.Chunk | NonetError
Sink = Callable[[list[tuple[Any, Item]]], None]  # what a step brought: (the key given at submission, item) of each
log = logging.getLogger("nonet")
_POLL_MS = 200
_STOP_S = 5.0


class FrontEnd(ABC):
    """What all front ends share. `number` is this one's, 0 the starter's; `name` is the engine's."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, name: str, number: int, tally: Tally) -> None:
        self.spec, self.config, self.number = spec, config, number
        self._tally = tally
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: dict[str, _Open] = {}  # by the name between processes
        self._names: dict[str, str] = {}  # the name of each open request id
        self._numbers = itertools.count()
        self._turn = itertools.count(number)
        self._error: NonetError | None = None
        self._mourners: list[Callable[[NonetError], None]] = []
        self._closing = False
        self._ready: dict[int, m.Ready] = {}
        self._stats: dict[int, list[m.Stats]] = {}
        self._mail = FrontEndMail(name, number)
        self._receiver = threading.Thread(target=self._receive, daemon=True, name="nonet-receive")

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, sequences: Sequence[m.Add], sink: Sink, dp_rank: int | None = None, key: object = None) -> int:
        """Send the sequences of a request to one data-parallel rank and return it; `sink` gets what they bring.

        Without `dp_rank` the rank with the fewest tokens outstanding is taken. Sequences with the same sink get what
        a step brought them in one call, each item beside its `key`. Raises RequestError or EngineDeadError.
        """
        with self._lock:
            self._check_alive()
            size = self.config.parallel.data_parallel_size
            if dp_rank is None:
                turn, totals = next(self._turn), self._tally.totals()
                dp_rank = min(range(size), key=lambda r: (totals[r], (r - turn) % size))
            elif not 0 <= dp_rank < size:
                raise RequestError("data_parallel_rank", dp_rank, f"ranks are 0 to {size - 1}")
            for sequence in sequences:
                if sequence.request_id in self._names:
                    raise RequestError("request_id", sequence.request_id, "is in use; give another")
            for sequence in sequences:
                name = m.sequence_name(self.number, next(self._numbers))
                tokens = len(sequence.tokens) + sequence.max_tokens
                self._names[sequence.request_id] = name
                self._open[name] = _Open(sequence.request_id, sink, key, dp_rank, tokens, len(sequence.tokens))
                self._tally.add(dp_rank, tokens)
                sent = msgspec.structs.replace(sequence, request_id=name)
                self._mail.send(dp_rank * self.config.parallel.tensor_parallel_size, sent)
            return dp_rank

    def abort(self, request_ids: Sequence[str], key: object = None) -> None:
        """Forget sequences; those that are done already are ignored. A sink's last chunk says "abort".

        With a `key`, only those submitted with it: an id may have been taken again by another request.
        """
        told: dict[Sink, list[tuple[Any, Item]]] = {}
        with self._lock:
            names: dict[int, list[str]] = {}
            for request_id in request_ids:
                name = self._names.get(request_id)
                if name is None or (key is not None and self._open[name].key is not key):
                    continue
                entry = self._open[name]
                self._forget(name)
                names.setdefault(entry.dp_rank, []).append(name)
                told.setdefault(entry.sink, []).append((entry.key, m.Chunk(request_id, [], finish_reason="abort")))
            for dp_rank, its_names in names.items():
                self._mail.send(dp_rank * self.config.parallel.tensor_parallel_size, m.Abort(its_names))
        _hand_over(told)

    def stats(self, reset_load: bool = False, timeout_s: float = 30.0) -> list[m.Stats]:
        """Every rank's counters, in rank order. Raises EngineDeadError or CommTimeout."""
        with self._lock:
            self._check_alive()
            number = next(self._numbers)
            came: list[m.Stats] = []
            self._stats[number] = came
            self._send_all(m.GetStats(self.number, number, reset_load))
            try:
                self._wait(lambda: {s.rank for s in came}, timeout_s, "stats")
                return sorted(came, key=lambda s: s.rank)
            finally:
                del self._stats[number]

    @property
    def error(self) -> NonetError | None:
        """Why the engine is dead; None while it lives."""
        return self._error

    def on_death(self, tell: Callable[[NonetError], None]) -> Callable[[], None]:
        """Call `tell` once, from any thread, when the engine dies, or now if it is dead. Returns what takes it back."""
        with self._lock:
            if self._error is None:
                self._mourners.append(tell)
                return partial(self._take_back, tell)
        tell(self._error)
        return lambda: None

    @property
    def pending(self) -> list[int]:
        """Tokens outstanding on each data-parallel rank, of all front ends."""
        return self._tally.totals()

    @property
    def ready(self) -> list[m.Ready]:
        """What each rank reported at its start."""
        return [self._ready[rank] for rank in sorted(self._ready)]

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return [ready.pid for ready in self.ready]

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache of a rank holds: no prompt with its output can be longer."""
        return min(ready.num_blocks for ready in self._ready.values()) * self.config.cache.block_size

    def fail(self, error: NonetError) -> None:
        """Declare the engine dead: every open sequence is told, and who asked by `on_death`. Only the first counts."""
        told: dict[Sink, list[tuple[Any, Item]]] = {}
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            for name, entry in list(self._open.items()):
                self._forget(name)
                told.setdefault(entry.sink, []).append((entry.key, copy.copy(error)))
            mourners, self._mourners = self._mourners, []
            self._changed.notify_all()
        _hand_over(told)
        for tell in mourners:
            tell(error)

    @abstractmethod
    def close(self) -> None:
        """End this front end; open sequences get an error."""

    # -- inside --------------------------------------------------------------------------------------------------

    def _send_all(self, message: m.ToRank) -> None:
        for rank in range(self.config.world_size):
            self._mail.send(rank, message)

    def _take_back(self, tell: Callable[[NonetError], None]) -> None:
        with self._lock:
            if tell in self._mourners:
                self._mourners.remove(tell)

    def _check_alive(self) -> None:
        if self._error is not None:
            raise copy.copy(self._error)  # each its own: raising one again and again would pile up its traceback

    def _wait(self, came: Callable[[], set[int]], timeout_s: float, what: str) -> None:
        """Wait, holding the lock, until all ranks came; ends early if the engine dies."""
        ranks = set(range(self.config.world_size))
        if not self._changed.wait_for(lambda: came() == ranks or self._error is not None, timeout_s):
            raise CommTimeout(what, timeout_s, sorted(ranks - came()))
        self._check_alive()

    def _forget(self, name: str) -> None:
        entry = self._open.pop(name)
        del self._names[entry.request_id]
        self._tally.add(entry.dp_rank, -entry.pending)

    def _receive(self) -> None:
        """Thread: take messages from ranks until closing."""
        try:
            while not self._closing:
                message = self._mail.receive(_POLL_MS)
                if message is not None:
                    self._handle(message)
        except Exception as error:  # noqa: BLE001 - without this thread every request would wait for ever
            log.exception("the front end cannot go on")
            self.fail(EngineDeadError(f"the front end failed: {type(error).__name__}: {error}"))

    def _handle(self, message: m.FromRank) -> None:
        match message:
            case m.Chunks():
                self._take_step(message.chunks)
            case m.Refused():
                self._take_refusal(message)
            case m.Stats():
                with self._lock:
                    if message.number in self._stats:
                        self._stats[message.number].append(message)
                    self._changed.notify_all()

    def _take_step(self, chunks: list[m.Chunk]) -> None:
        """Hand out what a step of one rank brought."""
        brought: dict[Sink, list[tuple[Any, Item]]] = {}
        with self._lock:
            for chunk in chunks:
                entry = self._open.get(chunk.request_id)
                if entry is None:
                    continue  # aborted meanwhile
                came = len(chunk.tokens) + entry.prompt
                entry.prompt = 0
                entry.pending -= came
                self._tally.add(entry.dp_rank, -came)
                if chunk.finish_reason is not None:
                    self._forget(chunk.request_id)
                chunk.request_id = entry.request_id
                brought.setdefault(entry.sink, []).append((entry.key, chunk))
        _hand_over(brought)

    def _take_refusal(self, message: m.Refused) -> None:
        with self._lock:
            entry = self._open.get(message.request_id)
            if entry is None:
                return
            self._forget(message.request_id)
        error: NonetError = RequestError("request", entry.request_id, "; ".join(message.arguments))
        if message.kind == "CapacityError":
            error = CapacityError(*message.arguments)
        elif message.kind == "RequestError":
            error = RequestError(*message.arguments)
        _hand_over({entry.sink: [(entry.key, error)]})

    def _end_mail(self) -> None:
        self._closing = True
        self._receiver.join(_STOP_S)
        self._mail.close()


class _Open:
    """A sequence in flight."""

    __slots__ = ("dp_rank", "key", "pending", "prompt", "request_id", "sink")

    def __init__(self, request_id: str, sink: Sink, key: object, dp_rank: int, pending: int, prompt: int) -> None:
        self.request_id, self.sink, self.key = request_id, sink, key
        self.dp_rank, self.pending, self.prompt = dp_rank, pending, prompt


def _hand_over(brought: dict[Sink, list[tuple[Any, Item]]]) -> None:
    """A receiver that fails (its event loop is closed, mostly) must not stop the others."""
    for sink, items in brought.items():
        try:
            sink(items)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the receiver's
            log.warning("nobody takes what came for %d request(s): %s", len(items), error)
