"""Tokens outstanding on each data-parallel rank, counted over all front ends: a page of shared memory without a name.

Used by `front_end` to choose a rank. Each front end writes its own row only and everyone sums the rows, so there is
no lock; two that choose at the same instant may choose alike, and the next choice makes up for it.
"""

from __future__ import annotations

import mmap
import os

_WORD = 8


class Tally:
    """`front_ends` rows of `dp_size` counts. `number` is the row of this front end."""

    def __init__(self, fd: int, number: int, front_ends: int, dp_size: int) -> None:
        self._number, self._size = number, dp_size
        memory = mmap.mmap(fd, front_ends * dp_size * _WORD)  # with a descriptor of its own; lives as long as this
        self._counts = memoryview(memory).cast("q")

    def add(self, dp_rank: int, tokens: int) -> None:
        """`tokens` more (or less) that this front end has outstanding on a rank."""
        self._counts[self._number * self._size + dp_rank] += tokens

    def totals(self) -> list[int]:
        """Of all front ends, by rank."""
        return [sum(self._counts[rank :: self._size]) for rank in range(self._size)]

    def clear(self, number: int) -> None:
        """A front end that ended has nothing outstanding any more."""
        first = number * self._size
        for place in range(first, first + self._size):
            self._counts[place] = 0


def new_page(front_ends: int, dp_size: int) -> int:
    """The descriptor of a page of zeros for so many rows; inherited by nobody."""
    fd = os.memfd_create("nonet-tally", os.MFD_CLOEXEC)
    os.ftruncate(fd, front_ends * dp_size * _WORD)
    return fd
