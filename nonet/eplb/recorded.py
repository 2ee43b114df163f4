"""Recorded routing as arrays: folded back to experts, summed by rank, replayed under another placement.

Made by `statistics` from files; used by `nonet eplb`, planners and simulation. Knows no files.
Legend: N iterations, R source ranks (whose tokens), L MoE layers, G global slots, E experts, P ranks that hold slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nonet.config.fleet import Fleet
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Epoch:
    """From this iteration on slots held what `placement` says."""

    first_iteration: int
    placement: Placement


@dataclass(frozen=True)
class Statistics:
    """Tokens by slot: of `count_NRLG[n]`, iteration `first_iteration + n`. `layers` are the model's indices of L.

    `top_k` is None where the source does not say. `spread`: experts were really spread over the ranks; if not, they
    are laid out here as if they had been.
    """

    count_NRLG: Counts
    layers: tuple[int, ...]
    first_iteration: int
    epochs: tuple[Epoch, ...]
    top_k: int | None = None
    spread: bool = True

    @property
    def num_iterations(self) -> int:
        return int(self.count_NRLG.shape[0])

    @property
    def num_ranks(self) -> int:
        """Ranks whose tokens were counted."""
        return int(self.count_NRLG.shape[1])

    @property
    def num_experts(self) -> int:
        return self.epochs[0].placement.num_experts

    @property
    def placement(self) -> Placement:
        """The last one."""
        return self.epochs[-1].placement

    def parts(self) -> list[tuple[slice, Placement]]:
        """Iterations (as indices of N) and the placement that held in them."""
        starts = [max(0, epoch.first_iteration - self.first_iteration) for epoch in self.epochs]
        ends = [*starts[1:], self.num_iterations]
        return [
            (slice(start, end), epoch.placement)
            for start, end, epoch in zip(starts, ends, self.epochs, strict=True)
            if start < end
        ]

    def logical(self) -> Counts:
        """[N, R, L, E] tokens by expert: the counts of its slots, added up."""
        out = np.empty((*self.count_NRLG.shape[:3], self.num_experts), dtype=np.int32)
        for part, placement in self.parts():
            for layer, expert_G in enumerate(placement.expert_LG):
                order = np.argsort(expert_G, kind="stable")
                first = np.searchsorted(expert_G[order], np.arange(self.num_experts))
                out[part, :, layer] = np.add.reduceat(self.count_NRLG[part, :, layer][..., order], first, axis=-1)
        return out

    def load(self) -> npt.NDArray[np.int64]:
        """[N, L, E] tokens by expert, of all ranks: what planners take."""
        total: npt.NDArray[np.int64] = self.logical().sum(axis=1, dtype=np.int64)
        return total

    def slot_load(self) -> npt.NDArray[np.float64]:
        """[N, L, G] tokens by slot, of all ranks."""
        return self.count_NRLG.sum(axis=1, dtype=np.float64)

    def rank_load(self) -> npt.NDArray[np.float64]:
        """[N, L, P] tokens by the rank that holds their slot."""
        load_NLG = self.slot_load()
        out = np.empty((*load_NLG.shape[:2], self.placement.fleet.num_ranks))
        for part, placement in self.parts():
            first = placement.fleet.first_slot
            sums = np.concatenate([np.zeros((*load_NLG[part].shape[:2], 1)), np.cumsum(load_NLG[part], axis=-1)], -1)
            out[part] = sums[..., first[1:]] - sums[..., first[:-1]]
        return out

    def replay(self, placement: Placement) -> Statistics:
        """The same tokens under another placement, slot by slot as the engine would have sent them.

        Each rank's tokens of an iteration take an expert's replicas in turn, beginning at the rank's own number: the
        rule of `moe.lookup`, so the counts are what a run with the same batches records. Raises ConfigError.
        """
        if placement.num_layers != len(self.layers) or placement.num_experts != self.num_experts:
            shape = f"{placement.num_layers} layers of {placement.num_experts} experts"
            here = f"{len(self.layers)} layers of {self.num_experts}"
            raise ConfigError("placement", shape, f"the statistics are of {here}")
        logical, rank_R1 = self.logical(), np.arange(self.num_ranks)[:, None]
        out = np.empty((*logical.shape[:3], placement.fleet.num_slots), dtype=np.int32)
        for layer, expert_G in enumerate(placement.expert_LG):
            _, count_E = placement.replicas(layer)
            count_G, turn_G = count_E[expert_G], _occurrence(expert_G)
            tokens_NRG = logical[:, :, layer][..., expert_G]
            has_one_more = (turn_G - rank_R1) % count_G < tokens_NRG % count_G
            out[:, :, layer] = tokens_NRG // count_G + has_one_more
        return replace(self, count_NRLG=out, epochs=(Epoch(self.first_iteration, placement),), spread=True)

    def between(self, start: int | None, stop: int | None) -> Statistics:
        """Iterations `start` to `stop` - 1 only. Raises ConfigError if some of them were not recorded."""
        first = self.first_iteration
        chosen = iterations_between(start, stop, first, first + self.num_iterations)
        part = slice(chosen.start - first, chosen.stop - first)
        return replace(self, count_NRLG=self.count_NRLG[part], first_iteration=chosen.start)

    def spread_over(self, num_ranks: int) -> Statistics:
        """The same counts as if slots were spread in order over so many ranks. Raises ConfigError."""
        slots = self.placement.fleet.num_slots
        if not 1 <= num_ranks <= slots:
            raise ConfigError("ep_size", num_ranks, f"use 1 to {slots}: each rank needs one of the {slots} slots")
        fleet = Fleet.even(num_ranks, slots)
        epochs = tuple(Epoch(e.first_iteration, replace(e.placement, fleet=fleet)) for e in self.epochs)
        return replace(self, epochs=epochs, spread=False)


def iterations_between(start: int | None, stop: int | None, first: int, end: int) -> range:
    """`start` to `stop` - 1, by default all of `first` to `end` - 1, which are there. Raises ConfigError."""
    start, stop = first if start is None else start, end if stop is None else stop
    there = f"iterations {first} to {end - 1} are recorded"
    if not first <= start < end:
        raise ConfigError("iter_start", start, there)
    if not start < stop <= end:
        raise ConfigError("iter_stop", stop, f"use {start + 1} to {end}: {there}")
    return range(start, stop)


def _occurrence(expert_G: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """[G] how many slots before this one hold the same expert."""
    order = np.argsort(expert_G, kind="stable")
    ordered = expert_G[order]
    out = np.empty(len(expert_G), dtype=np.int64)
    out[order] = np.arange(len(expert_G)) - np.searchsorted(ordered, ordered)
    return out
