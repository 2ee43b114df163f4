"""The replica graph of a placement: which live ranks hold each expert. Built once a placement, read by dispatch rules.

A host is a live rank that holds an expert. Only experts with several hosts leave a choice; two replicas on one rank
are one host, and replicas on dead ranks are none. Knows no loads.
Legend: L MoE layers, E experts, G global slots, R ranks, M experts with several hosts and H their hosts, all layers
behind each other (the hosts of an expert are consecutive, in rank order).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nonet.eplb.load import live_slots
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replicas:
    """Arrays that compiled loops can walk; see the legend."""

    placement: Placement
    home_LE: Ints  # the rank of an expert with one host, else -1
    first_L: Ints  # L + 1: where the experts of a layer begin in M
    expert_M: Ints
    start_M: Ints  # M + 1: where the hosts of an expert begin in H
    rank_H: Ints
    of_H: Ints  # the expert of M that a host belongs to
    held_LR: Ints  # [L, R + 1] where the hosts that a rank is begin in held_H
    held_H: Ints  # hosts by layer and rank
    host_LG: Ints  # the host that a slot belongs to; -1 for experts with one host and for slots on dead ranks
    twins_LG: Ints  # slots that the expert of a live slot has on its rank; 0 on dead ranks
    count_LE: Ints  # live slots of each expert
    order_LG: Ints  # slots grouped by expert, ascending in each; those on dead ranks last
    tree_LR3: Ints  # a spanning forest, leaves first: (rank, its host, the host of the same expert on its parent rank)
    root_LR: Ints  # the root of each rank's tree; itself for roots

    @classmethod
    def of(cls, placement: Placement) -> Replicas:
        """Raises ConfigError where an expert has no live replica."""
        live_G = live_slots(placement)
        parts: list[_Layer] = []
        hosts = experts = 0
        for layer in range(placement.num_layers):
            parts.append(_Layer.of(placement, layer, live_G, experts, hosts))
            experts, hosts = experts + len(parts[-1].expert_M), hosts + len(parts[-1].rank_H)
        expert_LG = np.where(live_G, placement.expert_LG, placement.num_experts)
        return cls(
            placement=placement,
            home_LE=np.stack([part.home_E for part in parts]),
            first_L=np.cumsum([0] + [len(part.expert_M) for part in parts]),
            expert_M=np.concatenate([part.expert_M for part in parts]),
            start_M=np.append(np.concatenate([part.start_M for part in parts]), hosts),
            rank_H=np.concatenate([part.rank_H for part in parts]),
            of_H=np.concatenate([part.of_H for part in parts]),
            held_LR=np.stack([part.held_R for part in parts]),
            held_H=np.concatenate([part.held_H for part in parts]),
            host_LG=np.stack([part.host_G for part in parts]),
            twins_LG=np.stack([part.twins_G for part in parts]),
            count_LE=np.stack([part.count_E for part in parts]),
            order_LG=np.argsort(expert_LG, axis=1, kind="stable"),
            tree_LR3=np.stack([part.tree_R3 for part in parts]),
            root_LR=np.stack([part.root_R for part in parts]),
        )

    def components(self) -> Ints:
        """[L] parts into which the graph of live ranks falls (ranks joined by an expert that both hold).

        Within a part load can be shifted from any rank to any other, as far as the joining experts have tokens;
        between parts nothing can.
        """
        live = list(self.placement.fleet.live_ranks)
        return np.array([len(set(root_R[live])) for root_R in self.root_LR])


@dataclass(frozen=True)
class _Layer:
    """The same of one layer; hosts and experts are counted from the first of all layers."""

    home_E: Ints
    expert_M: Ints
    start_M: Ints  # without the end
    rank_H: Ints
    of_H: Ints
    held_R: Ints
    held_H: Ints
    host_G: Ints
    twins_G: Ints
    count_E: Ints
    tree_R3: Ints
    root_R: Ints

    @classmethod
    def of(cls, placement: Placement, layer: int, live_G: npt.NDArray[np.bool_], first_m: int, first_h: int) -> _Layer:
        ranks, experts = placement.fleet.num_ranks, placement.num_experts
        key_G = placement.expert_LG[layer].astype(np.int64) * ranks + placement.rank_of_slot()
        pair_P, of_live, twins_P = np.unique(key_G[live_G], return_inverse=True, return_counts=True)  # by expert, rank
        expert_P, rank_P = pair_P // ranks, pair_P % ranks
        hosts_E = np.bincount(expert_P, minlength=experts)
        if hosts_E.min() == 0:
            lost = int(hosts_E.argmin())
            raise ConfigError("placement", lost, f"layer {layer}: no replica of it is on a live rank; plan again")
        shared_P = hosts_E[expert_P] > 1
        home_E = np.full(experts, -1)
        home_E[expert_P[~shared_P]] = rank_P[~shared_P]
        host_P = np.where(shared_P, first_h + np.cumsum(shared_P) - 1, -1)
        host_G, twins_G = np.full(len(key_G), -1), np.zeros(len(key_G), np.int64)
        host_G[live_G], twins_G[live_G] = host_P[of_live], twins_P[of_live]
        expert_M, rank_H = np.flatnonzero(hosts_E > 1), rank_P[shared_P]
        start_M = np.append(0, np.cumsum(hosts_E[expert_M]))
        of_H = np.repeat(np.arange(len(expert_M)), np.diff(start_M))
        held_R = np.append(0, np.cumsum(np.bincount(rank_H, minlength=ranks)))
        held_H = np.argsort(rank_H, kind="stable")
        tree_R3, root_R = _forest(start_M, rank_H, of_H, held_R, held_H)
        tree_R3[:, 1:] += np.where(tree_R3[:, 1:] < 0, 0, first_h)
        return cls(
            home_E, expert_M, start_M[:-1] + first_h, rank_H, of_H + first_m, held_R + first_h, held_H + first_h,
            host_G, twins_G, np.bincount(placement.expert_LG[layer][live_G], minlength=experts), tree_R3, root_R,
        )  # fmt: skip


def _forest(start_M: Ints, rank_H: Ints, of_H: Ints, held_R: Ints, held_H: Ints) -> tuple[Ints, Ints]:
    """(tree_R3, root_R) by breadth-first search over experts and ranks; -1 for the hosts of roots."""
    num_ranks = len(held_R) - 1
    root_R = np.full(num_ranks, -1)
    found: list[tuple[int, int, int]] = []
    for root in range(num_ranks):
        if root_R[root] >= 0:
            continue
        root_R[root], queue = root, [(root, -1, -1)]
        for rank, *_ in queue:
            for here in held_H[held_R[rank] : held_R[rank + 1]]:
                m = of_H[here]
                for there in range(start_M[m], start_M[m + 1]):
                    if root_R[rank_H[there]] < 0:
                        root_R[rank_H[there]] = root
                        queue.append((int(rank_H[there]), there, int(here)))
        found += queue
    return np.array(found[::-1]).reshape(num_ranks, 3), root_R
