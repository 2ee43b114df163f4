"""One-sided exchange among CPU ranks of one host, over shared memory: no collective call in dispatch or combine.

The protocol that NVLink kernels follow too: a rank *pushes* each row once into its own place in
every target's receive buffer, then raises a word there that carries the epoch and the number of rows; a receiver waits
for the words of all ranks. After computing, it lays the results of all sources in one block and raises a word for each
source that carries the epoch and where its part starts; a sender waits for those and *pulls*. Buffers need no second
copy: a rank pushes epoch e + 1 only after pulling e, and overwrites its results of e only after everyone pushed e + 1.
Legend: see moe/base.py; P rows sent to one rank, B rows that one rank may send (max_rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonet.comm.group import Pending
from nonet.comm.peer import Windows, align
from nonet.comm.wait import fence, wait_until
from nonet.errors import ConfigError
from nonet.kernels.cpu import routing
from nonet.kernels.cpu import rows as kernel
from nonet.moe.all2all._rows import sum_spread
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes

_COUNT = (1 << 32) - 1  # a flag word is epoch << 32 | number of rows, or first row


def create(spec: All2AllSpec) -> All2All:
    if spec.group.device.type != "cpu":
        raise ConfigError("all2all_backend", "shm", "moves CPU tensors; on GPUs use allgather_reducescatter")
    return SharedMemory(spec)


@dataclass(frozen=True, slots=True)
class _Ticket:
    epoch: int
    tokens: list[Tensor]  # for each rank, the tokens it got of this one: token_P
    received: list[int]  # rows from each rank
    slot_TK: Tensor
    weight_TK: Tensor


class SharedMemory:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec = spec
        bounds = spec.fleet.first_slot
        self._spans = list(zip(bounds, bounds[1:], strict=False))  # each rank's first slot, and the next rank's
        self.takes: Takes = "pairs" if spec.exact else "rows"
        self.epoch = 0
        group, B, K, D = spec.group, spec.max_rows, spec.top_k, spec.hidden_size
        R, me, ranks = group.size, group.rank, range(group.size)
        y_rows = R * B * (K if spec.exact else 1)  # results: one a pair, or their sum
        sizes = [8 * R, 8 * R, R * B * D * spec.dtype.itemsize, R * B * 2 * K * 4, y_rows * D * spec.dtype.itemsize]
        offset = [sum(align(size) for size in sizes[:i]) for i in range(len(sizes) + 1)]
        windows = Windows(group, offset[-1])
        self._arrived = [windows.words(r, offset[0], R) for r in ranks]  # of rank r's window: a word for each source
        self._ready = [windows.words(r, offset[1], R) for r in ranks]
        x = [windows.tensor(r, offset[2], (R, B, D), spec.dtype) for r in ranks]
        note = [windows.tensor(r, offset[3], (R, B, 2 * K), torch.int32) for r in ranks]  # K slots, K weights
        self._x_to, self._x_from = [x[r][me] for r in ranks], x[me]
        self._note_to, self._note_from = [note[r][me] for r in ranks], note[me]
        self._y = [windows.tensor(r, offset[4], (y_rows, D), spec.dtype) for r in ranks]

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        assert x_TD.shape[0] <= self.spec.max_rows, "the layer chunks what is larger"
        self.epoch += 1
        epoch, me, size = self.epoch, self.spec.group.rank, self.spec.group.size
        note = slot_TK.contiguous(), weight_TK.contiguous()
        tokens: list[Tensor] = [slot_TK] * size
        for target in (*range(me + 1, size), *range(me + 1)):  # starting at different ranks
            where = self._x_to[target], self._note_to[target]
            tokens[target] = kernel.push(x_TD.contiguous(), note, self._spans[target], *where)
            fence()
            self._arrived[target][me] = epoch << 32 | len(tokens[target])
        return Pending(lambda: self._receive(epoch, tokens, slot_TK, weight_TK))

    def _receive(self, epoch: int, tokens: list[Tensor], slot_TK: Tensor, weight_TK: Tensor) -> Dispatched:
        words = self._arrived[self.spec.group.rank]
        self._wait("dispatch", lambda: [word >> 32 for word in words], epoch)
        received = [word & _COUNT for word in words]
        x_ND, note_NK = kernel.join(self._x_from, received), kernel.join(self._note_from, received)
        slot_NK, weight_NK = note_NK.chunk(2, dim=1)
        pairs = routing.group(slot_NK, weight_NK.view(torch.float32), self.spec.first_slot, self.spec.num_slots)
        return Dispatched(x_ND, *pairs, _Ticket(epoch, tokens, received, slot_TK, weight_TK))

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        me = self.spec.group.rank
        if self.takes == "rows":
            counts = ticket.received
            self._y[me][: len(y)].copy_(y)
        else:
            flat = sent.pair_NK.reshape(-1)
            counts = [int((part >= 0).sum()) for part in sent.pair_NK.split(ticket.received)]
            torch.index_select(y, 0, flat[flat >= 0], out=self._y[me][: sum(counts)])
        fence()
        start = 0
        for source, count in enumerate(counts):
            self._ready[me][source] = ticket.epoch << 32 | start
            start += count
        return Pending(lambda: self._pull(ticket))

    def _pull(self, ticket: _Ticket) -> Tensor:
        me, T, D = self.spec.group.rank, len(ticket.slot_TK), self.spec.hidden_size
        self._wait("combine", lambda: [words[me] >> 32 for words in self._ready], ticket.epoch)
        starts = [words[me] & _COUNT for words in self._ready]
        if self.takes == "rows":  # partial sums, added in rank order
            out_TD = torch.zeros((T, D), dtype=torch.float32)
            for y, start, token_P in zip(self._y, starts, ticket.tokens, strict=True):
                kernel.add_rows(out_TD, token_P, y[start : start + len(token_P)])
            return out_TD.to(self.spec.dtype)
        out_TKD = torch.zeros((*ticket.slot_TK.shape, D), dtype=self.spec.dtype)
        for y, start, (first, end) in zip(self._y, starts, self._spans, strict=True):
            there_TK = (ticket.slot_TK >= first) & (ticket.slot_TK < end)
            out_TKD[there_TK] = y[start : start + int(there_TK.sum())]
        return sum_spread(out_TKD, ticket.weight_TK.masked_fill(ticket.slot_TK < 0, 0)).to(self.spec.dtype)

    def _wait(self, what: str, epochs: Callable[[], list[int]], epoch: int) -> None:
        """Until every rank has raised its word for `epoch`."""
        group = self.spec.group
        wait_until(
            lambda: min(epochs()) >= epoch,
            f"shm {what}",
            group.timeout_s,
            lambda: [group.ranks[r] for r, reached in enumerate(epochs()) if reached < epoch],
        )

    def poison(self) -> None:
        """For tests, between dispatch and combine: fill with NaN whatever this rank's window holds undefined then."""
        for tensor in (self._x_from, self._note_from, self._y[self.spec.group.rank]):
            tensor.view(torch.uint8).fill_(255)

    def close(self) -> None:
        pass
