"""One-sided exchange among CPU ranks of one host, over shared memory: no collective call in dispatch or combine.

The protocol that NVLink kernels follow too: a rank *pushes* each row once into its own place in every target's receive
buffer, then raises a word there that carries the epoch and the number of rows; a receiver waits for the words of all
ranks. After computing, it lays the results of all sources in one block and raises a word for each source that carries
the epoch and where its part starts; a sender waits for those and *pulls*. Buffers need no second copy: a rank pushes
epoch e + 1 only after pulling e, and overwrites its results of e only after everyone pushed e + 1.
The copies and flags are `kernels.cpu.exchange`. Legend: see moe/base.py; R ranks, B rows that one may send (max_rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nonet.comm.board import Board
from nonet.comm.group import Pending
from nonet.comm.peer import Windows, align
from nonet.comm.wait import wait_until
from nonet.errors import ConfigError
from nonet.kernels import cpu
from nonet.kernels.cpu import exchange
from nonet.kernels.cpu.exchange import addresses
from nonet.moe.all2all._rows import sum_spread
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes


def create(spec: All2AllSpec) -> All2All:
    if spec.group.device.type != "cpu":
        raise ConfigError("all2all_backend", "shm", "moves CPU tensors; on GPUs use nvlink_low_latency")
    return SharedMemory(spec)


@dataclass(frozen=True, slots=True)
class _Ticket:
    epoch: int
    sent: tuple[np.ndarray, np.ndarray]  # tokens that went to each rank [R, T], and how many
    received: np.ndarray  # rows from each rank
    x_TD: Tensor
    slot_TK: Tensor
    weight_TK: Tensor


class SharedMemory:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec, self.epoch = spec, 0
        self.takes: Takes = "pairs" if spec.exact else "rows"
        self._bounds = np.array(spec.fleet.first_slot, dtype=np.int64)
        group, B, K, D = spec.group, spec.max_rows, spec.top_k, spec.hidden_size
        R, me, ranks = group.size, group.rank, range(group.size)
        y_rows = R * B * (K if spec.exact else 1)  # results: one a pair, or their sum
        sizes = [8 * R, 8 * R, R * B * D * spec.dtype.itemsize, R * B * 2 * K * 4, y_rows * D * spec.dtype.itemsize]
        offset = [sum(align(size) for size in sizes[:i]) for i in range(len(sizes) + 1)]
        self._board = Board(group, spec.fleet.num_slots)  # there are no more experts than slots
        self._windows = Windows(group, offset[-1])  # holds the memory that the addresses below lie in
        tensor = self._windows.tensor
        flags = [[tensor(r, at, (R,), torch.int64) for r in ranks] for at in offset[:2]]  # a word for each source
        x = [tensor(r, offset[2], (R, B, D), spec.dtype) for r in ranks]
        note = [tensor(r, offset[3], (R, B, 2 * K), torch.int32) for r in ranks]  # K slots, K weights
        self._y = [tensor(r, offset[4], (y_rows, D), spec.dtype) for r in ranks]
        self._x, self._note = x[me], note[me]
        self._to = tuple(addresses([part[r][me] for r in ranks]) for part in (x, note, flags[0]))
        self._arrived, self._ready = (addresses([part[me][r] for r in ranks]) for part in flags)
        self._ready_at, self._y_at = addresses([flags[1][r][me] for r in ranks]), addresses(self._y)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        assert x_TD.shape[0] <= self.spec.max_rows, "the layer chunks what is larger"
        self.epoch += 1
        epoch = self.epoch
        sent = exchange.send(x_TD, slot_TK, weight_TK, self._bounds, self._to, self.spec.group.rank, epoch)

        def receive() -> Dispatched:
            self._wait("dispatch", self._arrived, epoch)
            received = exchange.numbers(self._arrived)
            own = self.spec.first_slot, self.spec.num_slots
            x_ND, pairs = exchange.receive(self._x, self._note, received, *own)
            return Dispatched(x_ND, *pairs, _Ticket(epoch, sent, received, x_TD, slot_TK, weight_TK))

        return Pending(receive)

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        counts = ticket.received
        if self.takes == "pairs":  # of each row, those that are here, in k order
            flat = sent.pair_NK.reshape(-1)
            here = [int((part >= 0).sum()) for part in sent.pair_NK.split(ticket.received.tolist())]
            y, counts = y.index_select(0, flat[flat >= 0]), np.array(here, dtype=np.int64)
        exchange.publish(y, self._y[self.spec.group.rank], counts, self._ready, ticket.epoch)
        return Pending(lambda: self._pull(ticket))

    def _pull(self, ticket: _Ticket) -> Tensor:
        self._wait("combine", self._ready_at, ticket.epoch)
        start_R = exchange.numbers(self._ready_at)
        if self.takes == "rows" and cpu.handles(ticket.x_TD):
            return exchange.pull(self._y_at, start_R, ticket.sent, ticket.x_TD)
        if self.takes == "rows":  # the same for float16, which is no type of those kernels
            total_TD = torch.zeros(ticket.x_TD.shape, dtype=torch.float32)
            for y, start, token_T, count in zip(self._y, start_R.tolist(), *ticket.sent, strict=True):
                total_TD.index_add_(0, torch.from_numpy(token_T[:count]), y[start : start + int(count)].float())
            return total_TD.to(self.spec.dtype)
        slot_TK, D = ticket.slot_TK, self.spec.hidden_size
        out_TKD = torch.zeros((*slot_TK.shape, D), dtype=self.spec.dtype)
        for r, (y, start) in enumerate(zip(self._y, start_R.tolist(), strict=True)):
            there_TK = (slot_TK >= int(self._bounds[r])) & (slot_TK < int(self._bounds[r + 1]))
            out_TKD[there_TK] = y[start : start + int(there_TK.sum())]
        return sum_spread(out_TKD, ticket.weight_TK.masked_fill(slot_TK < 0, 0)).to(self.spec.dtype)

    def _wait(self, what: str, flags: np.ndarray, epoch: int) -> None:
        """Until every rank has raised its word for `epoch`."""
        group = self.spec.group
        if not exchange.arrived(flags, epoch):
            wait_until(
                lambda: exchange.arrived(flags, epoch),
                f"shm {what}",
                group.timeout_s,
                lambda: [group.ranks[r] for r in range(group.size) if not exchange.arrived(flags[r : r + 1], epoch)],
            )

    def poison(self) -> None:
        """For tests, between dispatch and combine: fill with NaN whatever this rank's window holds undefined then."""
        for tensor in (self._x, self._note, self._y[self.spec.group.rank]):
            tensor.view(torch.uint8).fill_(255)

    def gather_counts(self, count_E: Tensor) -> Tensor:
        return torch.from_numpy(self._board.exchange(count_E.numpy()))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
