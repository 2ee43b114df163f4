"""What a simulation replays: recorded statistics or made-up loads, as whole tokens for a fleet of any size.

Recorded tokens are replayed as they are; on as many ranks as recorded them each token keeps its source rank. With
`tokens_per_rank` each step is drawn anew from its recorded shares, for a fleet of another size. Made-up loads always
have `tokens_per_rank`. Used by the command line, the advisor and benchmarks. Knows no files.
Legend: N steps, L MoE layers, E experts, R source ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nonet.eplb import synthetic
from nonet.eplb.recorded import Statistics
from nonet.errors import ConfigError, nearest

Ints = npt.NDArray[np.int64]

TOKENS_PER_RANK = 1024  # (token, expert) pairs a rank, layer and step: what TensorRT-LLM published its figures for
MOVES = ("steady", "drift", "topics-weak", "topics-strong")


class Workload(Protocol):
    """Loads for a fleet of so many ranks."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def num_experts(self) -> int: ...

    def steps(self, num_ranks: int) -> tuple[Ints, npt.NDArray[np.int32] | None]:
        """(load_NLE, load_NRLE by source rank where that is known)."""
        ...


@dataclass(frozen=True)
class Recorded:
    statistics: Statistics
    tokens_per_rank: int | None = None
    seed: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        return self.statistics.layers

    @property
    def num_experts(self) -> int:
        return self.statistics.num_experts

    def steps(self, num_ranks: int) -> tuple[Ints, npt.NDArray[np.int32] | None]:
        if self.tokens_per_rank is None:
            by_source = self.statistics.logical()
            total: Ints = by_source.sum(axis=1, dtype=np.int64)
            return total, by_source if by_source.shape[1] == num_ranks else None
        load_NLE = self.statistics.load()
        sums = load_NLE.sum(axis=2, keepdims=True)
        shares = (step / np.maximum(total, 1) for step, total in zip(load_NLE, sums, strict=True))
        drawn = synthetic.tokens(shares, len(load_NLE), num_ranks * self.tokens_per_rank, self.seed)
        return np.where(sums > 0, drawn, 0), None


@dataclass(frozen=True)
class MadeUp:
    """`name` is a popularity of `synthetic`; `moves`: how it changes from step to step; sd: by how much, for drift."""

    name: str
    num_steps: int
    num_layers: int = 58
    num_experts: int = 256
    tokens_per_rank: int = TOKENS_PER_RANK
    moves: str = "drift"
    sd: float = 0.10
    seed: int = 0

    def __post_init__(self) -> None:
        synthetic.parse(self.name)
        if self.moves not in MOVES:
            raise ConfigError("moves", self.moves, nearest(self.moves, MOVES))
        for field in ("num_steps", "num_layers", "num_experts", "tokens_per_rank"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "must be 1 or more")
        if not 0 <= self.sd <= 5:
            raise ConfigError("sd", self.sd, "a standard deviation of logarithms: 0 to 5")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.num_layers))

    def steps(self, num_ranks: int) -> tuple[Ints, npt.NDArray[np.int32] | None]:
        share_LE = synthetic.popularity(self.name, self.num_layers, self.num_experts, self.seed)
        if self.moves.startswith("topics"):
            mixing = synthetic.MIXING[self.moves.removeprefix("topics-")]
            shares = synthetic.mixed_topics(share_LE, mixing, self.seed)
        else:
            shares = synthetic.drifting(share_LE, self.sd if self.moves == "drift" else 0.0, self.seed)
        return synthetic.tokens(shares, self.num_steps, num_ranks * self.tokens_per_rank, self.seed), None
