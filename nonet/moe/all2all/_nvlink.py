"""One-sided exchange among the GPUs of an NVLink domain: what `nvlink_low_latency` and `nvlink_high_throughput` share.

The protocol of `shm`, by kernels: a rank *pushes* each token once into the window of every rank that holds one of its
slots, then adds to its flag there; a receiver waits for the flags of all ranks. Experts lay their sums in the window; a
sender waits for everyone's second flag and *pulls*. The host neither waits nor reads, so all of it can be captured in
graphs; row t of rank r lies at the same place of every window, after the rows of the ranks before it.
Buffers need no second copy: a rank pushes epoch e + 1 only after pulling e, which all had computed by then, and
overwrites its results of e only after everyone pushed e + 1. Waits are bounded on the device; `check` tells.
Legend: see moe/base.py; B rows that one rank may send (max_rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nonet.comm.group import Pending
from nonet.comm.peer import align
from nonet.comm.symmetric import open_windows
from nonet.errors import CommError, CommTimeout, ConfigError
from nonet.kernels import triton as gpu
from nonet.kernels.fp8 import FP8, ROW_BLOCK
from nonet.moe.base import All2AllSpec, Dispatched, Takes, check_fp8, gather_counts, group_by_slot


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is cut up: columns of a piece, warps of a program, most programs."""

    columns: int
    warps: int
    programs: int


PUSH = Launch(2048, 4, 1056)  # a row a program, then as many as the GPU holds


@dataclass(frozen=True, slots=True)
class Ticket:
    rows: tuple[int, ...]
    x_TD: Tensor
    slot_TK: Tensor
    weight_TK: Tensor


class Nvlink:
    captures = True

    def __init__(self, spec: All2AllSpec, name: str, pull: Launch) -> None:
        _check(spec, name)
        self.spec, self.name, self._pull = spec, name, pull
        self.takes: Takes = "pairs" if spec.exact else "rows"
        group, K, D = spec.group, spec.top_k, spec.hidden_size
        R, N = group.size, group.size * spec.max_rows
        y_rows = N * K if spec.exact else N
        parts: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("arrived", (R,), torch.int64),  # a flag for each source
            ("ready", (R,), torch.int64),
            ("x", (N, D), FP8 if spec.fp8 else spec.dtype),
            ("scale", (N, D // ROW_BLOCK if spec.fp8 else 0), torch.float32),
            ("slot", (N, K), torch.int32),  # counted from this rank's first
            ("weight", (N, K), torch.float32),
            ("y", (y_rows, D), spec.dtype),
            ("pair", (N, K if spec.exact else 0), torch.int64),
        ]
        self._at: dict[str, int] = {}
        size = 0
        for part, shape, dtype in parts:
            self._at[part] = size
            size += align(int(np.prod(shape)) * dtype.itemsize)
        self._windows = open_windows(group, size)  # holds the memory that the addresses below lie in
        own = {part: self._windows.tensor(group.rank, self._at[part], shape, dtype) for part, shape, dtype in parts}
        self._arrived, self._ready, self._x, self._scale = own["arrived"], own["ready"], own["x"], own["scale"]
        self._slot, self._weight, self._y, self._pair = own["slot"], own["weight"], own["y"], own["pair"]
        start_R = [self._windows.tensor(r, 0, (R,), torch.int64).data_ptr() for r in range(R)]
        start_G = np.repeat(start_R, spec.fleet.slots_by_rank)

        def on_device(numbers: Sequence[int] | np.ndarray) -> Tensor:
            return torch.tensor(np.asarray(numbers, dtype=np.int64), device=group.device)

        self._window_R, self._window_G = on_device(start_R), on_device(start_G)
        self._first_R = on_device(spec.fleet.first_slot[:R]).int()
        self._epoch, self._clock, self._late = on_device([0]), on_device([0]), on_device([0] * R)
        self._told = torch.zeros(R, dtype=torch.int64, pin_memory=group.device.type == "cuda")  # the same, for the host
        self._is_open = False
        self._meet()

    def _meet(self) -> None:
        """Exchange no rows: flags reach everyone, or this is no place to serve from. Compiles the kernels, too."""
        spec, device = self.spec, self.spec.group.device
        x_0D = torch.empty((0, spec.hidden_size), dtype=spec.dtype, device=device)
        slot_0K, weight_0K = (
            torch.empty((0, spec.top_k), dtype=t, device=device) for t in (torch.int64, torch.float32)
        )
        sent = self.dispatch(x_0D, slot_0K, weight_0K, [0] * spec.group.size).wait()
        self.combine(self._y[:0], sent).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        try:
            self.check()
        except CommTimeout as error:
            raise CommError(
                f"{self.name}: flags do not reach all GPUs; is every pair linked by NVLink? {error}"
            ) from error

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        assert max(rows) <= self.spec.max_rows, "the layer chunks what is larger"
        assert x_TD.shape[0] == rows[self.spec.group.rank], "a rank brings as many rows as it announced"
        assert not self._is_open, "a window holds one dispatch: combine it before the next"
        self._is_open = True
        ticket = Ticket(tuple(rows), x_TD.contiguous(), slot_TK.contiguous(), weight_TK.contiguous())
        self.push(ticket)

        def receive() -> Dispatched:
            self.wait()
            N = sum(rows)
            sent = group_by_slot(self._x[:N], self._slot[:N], self._weight[:N], self.spec.num_slots, ticket)
            return replace(sent, out=self._y[:N], scale_Nd=self._scale[:N] if self.spec.fp8 else None)

        return Pending(receive)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, Ticket)
        if y.data_ptr() != self._y.data_ptr() and len(y):
            self._y[: len(y)].copy_(y)
        if self.spec.exact:
            self._pair[: len(sent.pair_NK)].copy_(sent.pair_NK)
        self._is_open = False
        out_TD = self.pull(ticket)
        return Pending(lambda: out_TD)

    # -- what these are made of: a kernel each --------------------------------------------------------------------

    def push(self, ticket: Ticket) -> None:
        """Rows to the ranks that hold their slots, slots and weights to all; a share of this rank's flag with each."""
        from nonet.kernels.triton import exchange

        at, grid, shape = self._at, *self._cut(PUSH, len(ticket.x_TD))
        assert grid[0] <= exchange.WHOLE.value, "each program adds at least one to a flag"
        exchange.push[grid](
            ticket.x_TD, ticket.slot_TK, ticket.weight_TK, self._window_G, self._window_R, self._first_R,
            self._late, *self._numbers(ticket),
            at["x"], at["scale"], at["slot"], at["weight"], at["arrived"], FP8=self.spec.fp8, **shape,
        )  # fmt: skip

    def wait(self) -> None:
        """For what all ranks pushed."""
        from nonet.kernels.triton import exchange

        R = self.spec.group.size
        exchange.wait[(1,)](self._arrived, *self._waiting, R, RP=_power(R), num_warps=1)

    def pull(self, ticket: Ticket) -> Tensor:
        """[T, D] of the sums that lie in everyone's windows, once they are all there."""
        from nonet.kernels.triton import exchange

        out_TD = torch.empty(ticket.x_TD.shape, dtype=self.spec.dtype, device=ticket.x_TD.device)
        at, grid, shape = self._at, *self._cut(self._pull, len(out_TD))
        exchange.pull[grid](
            ticket.slot_TK, ticket.weight_TK, self._window_G, self._window_R, self._ready, *self._waiting, out_TD,
            *self._numbers(ticket), at["y"], at["pair"], at["ready"], EACH=self.spec.exact, **shape,
            enable_fp_fusion=not self.spec.exact,  # exact: products are rounded before they are added, as specified
        )  # fmt: skip
        return out_TD

    def _numbers(self, ticket: Ticket) -> tuple[int, ...]:
        """Where this rank's rows begin, T, D, K, R and its own number."""
        group = self.spec.group
        first = sum(ticket.rows[: group.rank])
        return first, len(ticket.x_TD), self.spec.hidden_size, self.spec.top_k, group.size, group.rank

    @property
    def _waiting(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        ticks = 2e2 if gpu.INTERPRETED else 1e9  # polls there, nanoseconds else
        return self._epoch, self._late, self._told, self._clock, int(self.spec.group.timeout_s * ticks)

    def _cut(self, launch: Launch, T: int) -> tuple[tuple[int], dict[str, int]]:
        """(grid, constants) for T tokens."""
        spec = self.spec
        columns = min(launch.columns, _power(spec.hidden_size))
        parts = -(-spec.hidden_size // columns)
        shape = {"KP": _power(spec.top_k), "RP": _power(spec.group.size), "TOP": spec.top_k}
        shape |= {"BD": columns, "PARTS": parts, "num_warps": launch.warps}
        return (max(1, min(T * parts, launch.programs)),), shape

    def check(self) -> None:
        if self._told.any():
            late = [rank for rank, epoch in zip(self.spec.group.ranks, self._told.tolist(), strict=True) if epoch]
            raise CommTimeout(f"{self.name} all-to-all", self.spec.group.timeout_s, late)

    def poison(self) -> None:
        """For tests, between dispatch and combine: fill with NaN whatever this rank's window holds undefined then."""
        for tensor in (self._slot, self._weight, self._y):
            tensor.view(torch.uint8).fill_(255)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return gather_counts(self.spec.group, count_E)

    def close(self) -> None:
        pass


def _check(spec: All2AllSpec, name: str) -> None:
    on_cuda = spec.group.device.type == "cuda"
    if not (on_cuda or gpu.INTERPRETED):
        raise ConfigError("all2all_backend", name, "moves tokens between GPUs; on CPUs use shm")
    if not gpu.HAS_TRITON:
        raise ConfigError("all2all_backend", name, "needs triton; install nonet[gpu]")
    check_fp8(spec)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()
