"""The ranks experts live on: slots, nodes, speeds, and which ranks are dead. Read by placement, planner and moe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from nonet.errors import ConfigError


def split_evenly(count: int, parts: int) -> tuple[int, ...]:
    """`count` things over `parts` owners in order; the first owners have one more where it does not divide."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


@dataclass(frozen=True)
class Fleet:
    """Expert-parallel ranks in order and the slots each holds. Raises ConfigError where the parts contradict.

    The time of a rank is its tokens divided by its speed. A dead rank takes no tokens: whatever its slots name,
    they hold no replica.
    """

    slots_by_rank: tuple[int, ...]
    node_of_rank: tuple[int, ...] = ()  # () = all on one node
    speed_of_rank: tuple[float, ...] = ()  # () = all 1.0
    dead_ranks: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        ranks = len(self.slots_by_rank)
        for field, values in (("node_of_rank", self.node_of_rank), ("speed_of_rank", self.speed_of_rank)):
            if values and len(values) != ranks:
                raise ConfigError(field, len(values), f"give a value for each of the {ranks} ranks, or none")
        for field, counts in (("slots_by_rank", self.slots_by_rank), ("node_of_rank", self.node_of_rank)):
            if any(count < 0 for count in counts):
                raise ConfigError(field, min(counts), "must be 0 or more")
        for speed in self.speed_of_rank:
            if not (math.isfinite(speed) and speed > 0):
                raise ConfigError("speed_of_rank", speed, "speeds are above 0 (1.0 is a usual rank)")
        for rank in sorted(self.dead_ranks):
            if not 0 <= rank < ranks:
                raise ConfigError("dead_ranks", rank, f"ranks are 0 to {ranks - 1}")

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

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank; 0 where none was given."""
        return self.node_of_rank or (0,) * self.num_ranks

    @property
    def speeds(self) -> tuple[float, ...]:
        """The speed of each rank; 1.0 where none was given."""
        return self.speed_of_rank or (1.0,) * self.num_ranks

    @property
    def live_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.num_ranks) if rank not in self.dead_ranks)
