"""The ranks experts live on: how many there are and how many slots each has. Read by placement and moe."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


def split_evenly(count: int, parts: int) -> tuple[int, ...]:
    """`count` things over `parts` owners in order; the first owners have one more where it does not divide."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


@dataclass(frozen=True)
class Fleet:
    """Expert-parallel ranks in order and the slots each holds."""

    slots_by_rank: tuple[int, ...]

    @classmethod
    def even(cls, num_ranks: int, num_slots: int) -> Fleet:
        return cls(split_evenly(num_slots, num_ranks))

    @property
    def num_ranks(self) -> int:
        return len(self.slots_by_rank)

    @property
    def num_slots(self) -> int:
        return sum(self.slots_by_rank)

    @property
    def first_slot(self) -> tuple[int, ...]:
        """First global slot of each rank, and the end: num_ranks + 1 values."""
        return (0, *accumulate(self.slots_by_rank))
