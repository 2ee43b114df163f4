"""Dispatch over replicas: which part of an expert's tokens each of its slots gets. Two rules behind one result, shares.

`even`: every replica the same part. `waterfill`: the split that makes the slowest rank as fast as can be, for the
load at hand (this step's, where all ranks know the counts of all, or a running average). `quota` and `sources` turn
shares into whole tokens. Used by planners, the simulator and the lookup of the MoE layers; no torch.
Legend: L MoE layers, E experts, R ranks, G global slots, H hosts (see `replicas`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.eplb import waterfill as _waterfill
from nonet.eplb.load import even_shares, rank_load
from nonet.eplb.placement import Placement
from nonet.eplb.quota import assign, quotas, slot_tokens
from nonet.eplb.replicas import Replicas
from nonet.eplb.sources import even_quota, own_quota
from nonet.errors import ConfigError

__all__ = [
    "Replicas", "WaterFill", "assign", "even_quota", "even_shares", "own_quota", "precompile", "quotas", "rank_load",
    "slot_tokens", "waterfill",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

WARM_SWEEPS = 8
DECAY = 0.8  # of a running average of the load, a step: about the best where loads move as published ones do
CLOSE = 5e-4  # to the bound, relative: half a token on a rank with 1,024
EXACT, MOST_SWEEPS = 1e-9, 100_000  # when a solution is wanted to the end


class WaterFill:
    """The water-filling rule for one placement; each solution begins where the last one ended."""

    def __init__(self, placement: Placement, share_LG: Floats | None = None) -> None:
        """Raises ConfigError where an expert has no live replica."""
        self.replicas = Replicas.of(placement)
        self._speed_R = np.array(placement.fleet.speeds)
        self.load_LR = np.zeros((placement.num_layers, placement.fleet.num_ranks))  # of the last solution
        start_LG = even_shares(placement) if share_LG is None else share_LG
        inside = self.replicas.host_LG >= 0
        hosts = len(self.replicas.rank_H)
        host_of_slot = self.replicas.host_LG[inside]
        self._share_H = np.bincount(host_of_slot, start_LG[inside], hosts).astype(np.float64)

    def solve(self, load_LE: npt.ArrayLike, sweeps: int | None = WARM_SWEEPS) -> Floats:
        """share_LG: parts of each expert's tokens by slot, summing to 1 an expert; 0 on dead ranks.

        load_LE: tokens, finite and not negative, float or integer. sweeps: how often each expert is poured anew at
        most, ending earlier once the slowest rank is proven to be within 5e-4 of the optimum; None: until it is within
        1e-9. An expert without tokens keeps its shares.
        """
        replicas = self.replicas
        load: Floats = np.ascontiguousarray(load_LE, dtype=np.float64)
        if load.shape != replicas.home_LE.shape:
            raise ConfigError("load", load.shape, f"must be [layers, experts] = {replicas.home_LE.shape}")
        _waterfill.solve(
            load, self._share_H, replicas.home_LE, replicas.first_L, replicas.expert_M, replicas.start_M,
            replicas.rank_H, replicas.of_H, replicas.held_LR, replicas.held_H, replicas.tree_LR3, replicas.root_LR,
            self._speed_R, MOST_SWEEPS if sweeps is None else sweeps, EXACT if sweeps is None else CLOSE, self.load_LR,
        )  # fmt: skip
        return self.share_LG

    @property
    def share_LG(self) -> Floats:
        """The shares of the last solution; replicas on one rank have the same."""
        replicas = self.replicas
        padded_H = np.append(self._share_H, 1.0)  # -1: the only host of its expert
        return np.divide(
            padded_H[replicas.host_LG],
            replicas.twins_LG,
            out=np.zeros(replicas.host_LG.shape),
            where=replicas.twins_LG > 0,
        )


def waterfill(
    load_LE: npt.ArrayLike,
    placement: Placement,
    *,
    share_LG: Floats | None = None,
    sweeps: int | None = WARM_SWEEPS,
) -> Floats:
    """share_LG [L, G] that make the slowest rank as fast as can be, beginning at `share_LG` (else even).

    For one load; `WaterFill` keeps what depends on the placement alone. Raises ConfigError as that does.
    """
    return WaterFill(placement, share_LG).solve(load_LE, sweeps)


def precompile() -> None:
    """Compile all loops of the rules, or read them from disk: once, before ranks are forked, which then have them."""
    placement = Placement.contiguous(1, 2, 2, 4)
    count_LE = np.ones((1, 2), np.int64)
    fill = WaterFill(placement)
    tokens_LG = slot_tokens(2 * count_LE, fill.solve(2 * count_LE), fill.replicas)
    quotas(np.ones((2, 2), np.int64), tokens_LG[0], fill.replicas, 0)
    own_quota(count_LE[0], fill.share_LG[0], fill.replicas, 0, 0)
