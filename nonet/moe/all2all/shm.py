"""One-sided exchange among CPU ranks of one host, over shared memory: no collective call in dispatch or combine.

The protocol that NVLink kernels follow too, in plain PyTorch: a rank *pushes* each row once into every target's
rank-major receive buffer, then raises its epoch flag there; a receiver waits for all flags. After computing, it lays
results where the rows came from and raises one flag of its own; a sender waits for that and *pulls*. Buffers need no
second copy: a rank pushes epoch e + 1 only after pulling e, and a peer overwrites results of e only after everyone
pushed e + 1.
Legend: see moe/base.py; B rows that one rank may send (max_rows).
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
from nonet.moe.all2all._route import Route, Router, add_rows, place_pairs
from nonet.moe.all2all._rows import sum_spread
from nonet.moe.base import All2All, All2AllSpec, Dispatched, Takes, group_by_slot


def create(spec: All2AllSpec) -> All2All:
    if spec.group.device.type != "cpu":
        raise ConfigError("all2all_backend", "shm", "moves CPU tensors; on GPUs use allgather_reducescatter")
    return SharedMemory(spec)


@dataclass(frozen=True)
class _Ticket:
    epoch: int
    route: Route
    received: list[int]
    weight_TK: Tensor


class SharedMemory:
    captures = False

    def __init__(self, spec: All2AllSpec) -> None:
        self.spec, self._router = spec, Router(spec)
        self.takes: Takes = "pairs" if spec.exact else "rows"
        self.epoch = 0
        group, B, K, D = spec.group, spec.max_rows, spec.top_k, spec.hidden_size
        R, ranks = group.size, range(group.size)
        y_rows = K if spec.exact else 1  # results a row: one a pair, or their sum
        sizes = [16 * R, 64, R * B * D * spec.dtype.itemsize, R * B * K * 8, R * B * K * 4]
        sizes.append(R * B * y_rows * D * spec.dtype.itemsize)
        offset = [sum(align(size) for size in sizes[:i]) for i in range(len(sizes) + 1)]
        self._windows = windows = Windows(group, offset[-1])
        self._arrived = [windows.words(r, offset[0], 2 * R) for r in ranks]  # count and epoch of each source
        self._ready = [windows.words(r, offset[1], 1) for r in ranks]  # epoch whose results are there
        self._x = [windows.tensor(r, offset[2], (R, B, D), spec.dtype) for r in ranks]
        self._slot = [windows.tensor(r, offset[3], (R, B, K), torch.int64) for r in ranks]
        self._weight = [windows.tensor(r, offset[4], (R, B, K), torch.float32) for r in ranks]
        self._y = [windows.tensor(r, offset[5], (R, B * y_rows, D), spec.dtype) for r in ranks]

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, rows: Sequence[int]) -> Pending[Dispatched]:
        assert x_TD.shape[0] <= self.spec.max_rows, "the layer chunks what is larger"
        self.epoch += 1
        me, route = self.spec.group.rank, self._router.route(slot_TK)
        x_PD, slot_PK, weight_PK = x_TD[route.token_P], slot_TK[route.token_P], weight_TK[route.token_P]
        for target, (start, end) in enumerate(route.segments()):
            count = end - start
            if count:
                self._x[target][me, :count] = x_PD[start:end]
                self._slot[target][me, :count] = slot_PK[start:end]
                self._weight[target][me, :count] = weight_PK[start:end]
            fence()
            self._arrived[target][2 * me] = count
            fence()
            self._arrived[target][2 * me + 1] = self.epoch
        epoch = self.epoch
        return Pending(lambda: self._receive(epoch, route, weight_TK))

    def _receive(self, epoch: int, route: Route, weight_TK: Tensor) -> Dispatched:
        group = self.spec.group
        flags = self._arrived[group.rank]
        self._wait("dispatch", lambda r: flags[2 * r + 1] >= epoch)
        received = [flags[2 * r] for r in range(group.size)]
        x_ND, slot_NK, weight_NK = (
            torch.cat([window[group.rank][r, :count] for r, count in enumerate(received)])
            for window in (self._x, self._slot, self._weight)
        )
        local = slot_NK - self.spec.first_slot
        local = torch.where((local >= 0) & (local < self.spec.num_slots), local, -1)
        return group_by_slot(
            x_ND, local, weight_NK, self.spec.num_slots, _Ticket(epoch, route, received, weight_TK)
        )

    def combine(self, y: Tensor, sent: Dispatched) -> Pending[Tensor]:
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        me = self.spec.group.rank
        if self.takes == "rows":
            counts, rows = ticket.received, y
        else:
            flat = sent.pair_NK.reshape(-1)
            counts = [int((part >= 0).sum()) for part in sent.pair_NK.split(ticket.received)]
            rows = y[flat[flat >= 0]]
        for source, part in enumerate(rows.split(counts)):
            self._y[me][source, : counts[source]] = part
        fence()
        self._ready[me][0] = ticket.epoch
        return Pending(lambda: self._pull(ticket))

    def _pull(self, ticket: _Ticket) -> Tensor:
        group, route = self.spec.group, ticket.route
        self._wait("combine", lambda r: self._ready[r][0] >= ticket.epoch)
        if self.takes == "rows":
            back_PD = torch.cat([self._y[r][group.rank, :count] for r, count in enumerate(route.counts)])
            return add_rows(back_PD, route, len(route.rank_TK)).to(self.spec.dtype)
        pairs = torch.bincount(route.rank_TK.reshape(-1), minlength=group.size + 1)[: group.size].tolist()
        back_QD = torch.cat([self._y[r][group.rank, :count] for r, count in enumerate(pairs)])
        weight_TK = ticket.weight_TK.masked_fill(route.rank_TK == group.size, 0)
        return sum_spread(place_pairs(back_QD, route), weight_TK).to(self.spec.dtype)

    def _wait(self, what: str, has: Callable[[int], bool]) -> None:
        group = self.spec.group
        ranks = range(group.size)
        wait_until(
            lambda: all(has(r) for r in ranks),
            f"shm {what}",
            group.timeout_s,
            lambda: [group.ranks[r] for r in ranks if not has(r)],
        )

    def close(self) -> None:
        pass
