"""The placement: which expert each slot holds. One array is the truth, all else is derived from it.

Built by the loader of a static placement or by a planner, read by the weights and by the lookup of the MoE layers.
Legend: L MoE layers, G global slots, E experts, R ranks, C most replicas of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nonet.config.assignments import check_assignments
from nonet.config.fleet import Fleet


@dataclass(frozen=True)
class Placement:
    """Slot g of MoE layer l holds expert `expert_LG[l, g]`; consecutive slots share a rank as the fleet says."""

    expert_LG: npt.NDArray[np.int32]
    fleet: Fleet
    num_experts: int

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_ranks: int, num_slots: int | None = None) -> Placement:
        """Experts in order over the ranks; slots beyond the experts repeat them from the first."""
        slots = num_experts if num_slots is None else num_slots
        order = np.arange(slots, dtype=np.int32) % num_experts
        return cls(np.tile(order, (num_layers, 1)), Fleet.even(num_ranks, slots), num_experts)

    @classmethod
    def from_assignments(
        cls,
        assignments: Mapping[int, Sequence[int]],
        moe_layers: Sequence[int],
        num_experts: int,
        num_slots: int,
        num_ranks: int,
    ) -> Placement:
        """From `initial_global_assignments`: model layer index -> the expert in each slot. Raises ConfigError."""
        rows = check_assignments(assignments, moe_layers, num_experts, num_slots)
        return cls(np.array(rows, dtype=np.int32), Fleet.even(num_ranks, num_slots), num_experts)

    @property
    def num_layers(self) -> int:
        return int(self.expert_LG.shape[0])

    def layer(self, layer: int) -> Placement:
        """One layer alone."""
        return Placement(self.expert_LG[layer : layer + 1], self.fleet, self.num_experts)

    def experts_on(self, rank: int, layer: int) -> list[int]:
        """The experts in the slots of a rank, in slot order; `layer` counts MoE layers."""
        first = self.fleet.first_slot
        return [int(e) for e in self.expert_LG[layer, first[rank] : first[rank + 1]]]

    def replicas(self, layer: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(slot_EC, count_E): the slots of each expert in ascending order, and how many; unused entries repeat.

        Slots of dead ranks are none; on live ranks every expert has one.
        """
        live = ~np.isin(self.rank_of_slot(), list(self.fleet.dead_ranks))
        row = self.expert_LG[layer]
        count = np.bincount(row[live], minlength=self.num_experts)
        slot = np.zeros((self.num_experts, int(count.max())), dtype=np.int64)
        for expert in range(self.num_experts):
            own = np.flatnonzero((row == expert) & live)
            slot[expert] = own[np.arange(slot.shape[1]) % len(own)]
        return slot, count.astype(np.int64)

    def rank_of_slot(self) -> npt.NDArray[np.int64]:
        """[G] the rank that holds each slot."""
        return np.repeat(np.arange(self.fleet.num_ranks), self.fleet.slots_by_rank)
