"""Ranks as a group: who is in it, and the collectives the engine uses, each bounded and counted.

Used by layers (tensor parallelism), the all-to-alls and start-up. A collective starts at the call and ends at
`.wait()`. Rows may be uneven or zero; every rank of the group enters every collective in the same order.
Knows nothing of models. Legend: T own rows, N rows of all ranks, D columns.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nonet.errors import CommError, CommTimeout

V = TypeVar("V")

# torch 2.13 renamed these two; 2.11 has only the old names
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Generic[V]):
    """Something started that `wait()` finishes, once. Other work may run in between."""

    __slots__ = ("_finish",)

    def __init__(self, finish: Callable[[], V]) -> None:
        self._finish = finish

    def wait(self) -> V:
        return self._finish()


class Group:
    """Some ranks of the world in order. `rank` and `size` are within the group; `ranks` are global."""

    def __init__(self, ranks: Sequence[int], world_rank: int, timeout_s: float, device: torch.device) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(world_rank)
        self.timeout_s, self.device = timeout_s, device
        self.calls = 0  # collectives entered
        self._roll: list[memoryview] | None = None  # how many each member entered, in shared memory
        self._handle = None  # alone, every collective is done before it starts
        if self.size > 1:
            timeout = datetime.timedelta(seconds=timeout_s)
            try:
                self._handle = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            except RuntimeError as error:
                raise comm_error(f"group of ranks {self.ranks}", error, timeout_s) from error

    def keep_roll(self, words: list[memoryview]) -> None:
        """Count collectives where the others can see it, so that a time-out can name who is missing."""
        self._roll = words

    @property
    def process_group(self) -> Any:
        """PyTorch's own object; of several ranks."""
        return self._handle

    def _enter(self) -> None:
        self.calls += 1
        if self._roll is not None:
            self._roll[self.rank][0] = self.calls

    def _start(self, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], None]:
        """Enter a collective; the returned function waits for it."""
        self._enter()
        try:
            work = call(*args, group=self._handle, async_op=True, **kwargs)
        except RuntimeError as error:
            raise self._translate(what, error) from error

        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._translate(what, error) from error

        return wait

    def _translate(self, what: str, error: RuntimeError) -> CommError:
        missing = []
        if self._roll is not None:
            missing = [self.ranks[r] for r in range(self.size) if self._roll[r][0] < self.calls]
        return comm_error(what, error, self.timeout_s, missing)

    def all_reduce(self, x: Tensor) -> Pending[Tensor]:
        """Sum over ranks, in place."""
        if self.size == 1:
            return Pending(lambda: x)
        wait = self._start("all_reduce", dist.all_reduce, x)

        def finish() -> Tensor:
            wait()
            return x

        return Pending(finish)

    def broadcast(self, x: Tensor, source: int) -> Pending[Tensor]:
        """Rank `source` (of the group) fills x everywhere, in place."""
        if self.size == 1:
            return Pending(lambda: x)
        wait = self._start("broadcast", dist.broadcast, x, src=self.ranks[source])

        def finish() -> Tensor:
            wait()
            return x

        return Pending(finish)

    def all_gather_rows(self, x_TD: Tensor, rows: Sequence[int]) -> Pending[Tensor]:
        """[sum(rows), ...]: everyone's rows in rank order; `rows[r]` is rank r's count, the same list on all ranks."""
        assert x_TD.shape[0] == rows[self.rank], "a rank brings as many rows as it announced"
        most = max(rows)
        if self.size == 1 or most == 0:  # with no row anywhere, all ranks agree to stay out
            return Pending(lambda: x_TD)
        x_TD = _pad(x_TD.contiguous(), most)
        out = x_TD.new_empty((self.size * most, *x_TD.shape[1:]))
        wait = self._start("all_gather", _gather_into, out, x_TD)

        def finish() -> Tensor:
            wait()
            return _unpad(out, rows, most)

        return Pending(finish)

    def reduce_scatter_rows(self, x_ND: Tensor, rows: Sequence[int]) -> Pending[Tensor]:
        """[rows[rank], ...]: the sum over ranks of this rank's share of the rows."""
        assert x_ND.shape[0] == sum(rows), "one row for each announced row"
        most = max(rows)
        if self.size == 1 or most == 0:
            return Pending(lambda: x_ND)
        if any(count != most for count in rows):
            x_ND = torch.cat([_pad(part, most) for part in x_ND.split(list(rows))])
        x_ND = x_ND.contiguous()
        out = x_ND.new_empty((most, *x_ND.shape[1:]))
        wait = self._start("reduce_scatter", _reduce_scatter, out, x_ND)

        def finish() -> Tensor:
            wait()
            return out[: rows[self.rank]]

        return Pending(finish)

    def all_to_all_rows(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending[Tensor]:
        """Rank r gets `send[r]` consecutive rows; the result holds `receive[r]` rows from each r, in rank order."""
        if self.size == 1:
            return Pending(lambda: x_ND)
        out = x_ND.new_empty((sum(receive), *x_ND.shape[1:]))
        wait = self._start("all_to_all", dist.all_to_all_single, out, x_ND.contiguous(), list(receive), list(send))

        def finish() -> Tensor:
            wait()
            return out

        return Pending(finish)

    def all_gather_object(self, item: V) -> list[V]:
        """Everyone's item in rank order; for start-up, not for steps."""
        if self.size == 1:
            return [item]
        out: list[Any] = [None] * self.size
        self._enter()
        try:
            dist.all_gather_object(out, item, group=self._handle)
        except RuntimeError as error:
            raise self._translate("all_gather_object", error) from error
        return out

    def barrier(self) -> None:
        """Wait until every rank is here; for start-up, not for steps."""
        if self.size > 1:
            here = torch.ones(1, device=self.device)
            self._start("barrier", dist.all_reduce, here)()
            # over NCCL the wait above only orders the stream; reading the sum holds the host until it is there
            assert here.item() == self.size, "every rank adds one"


def comm_error(what: str, error: RuntimeError, timeout_s: float, missing: Sequence[int] = ()) -> CommError:
    """PyTorch's error in one line, as the kind it is."""
    text = re.sub(r"^\[.*?\] ", "", str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    if "imed out" in text or "imeout" in text:
        return CommTimeout(what, timeout_s, missing)
    who = f" (not arrived: rank(s) {', '.join(map(str, missing))})" if missing else ""
    return CommError(f"{what}: {text}{who}")


def _pad(x: Tensor, rows: int) -> Tensor:
    """x with zero rows below, up to `rows`."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])


def _unpad(x: Tensor, rows: Sequence[int], most: int) -> Tensor:
    if all(count == most for count in rows):
        return x
    return torch.cat([x[r * most : r * most + count] for r, count in enumerate(rows)])
