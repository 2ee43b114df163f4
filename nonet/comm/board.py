"""A board on which every rank of a host writes numbers and reads everyone's: an all-gather without a collective call.

Over shared memory, one-sided. Each rank has two pages that alternate: it writes page n + 1 only after reading all of n,
which no one writes again before having read all of n + 1. Used by the all-to-all over shared memory.
"""

from __future__ import annotations

import numpy as np
import torch

from nonet.comm.group import Group
from nonet.comm.peer import Windows, align
from nonet.comm.wait import fence, wait_until

_HEADER = 64


class Board:
    """`width` int64 numbers a rank. Collective to build. Raises CommError if the ranks do not share a host."""

    def __init__(self, group: Group, width: int) -> None:
        self._group, self._epoch = group, 0
        page = align(8 * width)
        self._windows = Windows(group, _HEADER + 2 * page)
        ranks = range(group.size)
        self._flags = [self._windows.words(r, 0, 1) for r in ranks]
        self._pages = [
            [self._windows.tensor(r, _HEADER + p * page, (width,), torch.int64).numpy() for r in ranks]
            for p in range(2)
        ]

    def exchange(self, own: np.ndarray) -> np.ndarray:
        """int64 [R, n]: everyone's n numbers, n <= width, the same on all ranks. Raises CommTimeout."""
        self._epoch += 1
        epoch, group = self._epoch, self._group
        pages = self._pages[epoch % 2]
        pages[group.rank][: len(own)] = own
        fence()
        self._flags[group.rank][0] = epoch
        wait_until(
            lambda: all(flag[0] >= epoch for flag in self._flags),
            "exchange of counts",
            group.timeout_s,
            lambda: [group.ranks[r] for r, flag in enumerate(self._flags) if flag[0] < epoch],
        )
        return np.stack([page[: len(own)] for page in pages])
