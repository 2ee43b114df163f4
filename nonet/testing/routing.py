"""Made-up tokens for tests of the MoE layer: hidden states, experts and weights, rebuilt from a seed on any rank.

Each rank can make every other rank's tokens, so that an expected result needs no communication. `KINDS` are the ways
of routing; all are drawn on the CPU, so that every device sees the same numbers.
Legend: T tokens of one rank, D hidden, K top-k, E experts, H "home" experts, those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nonet.moe.simulate import simulated

Kind = Callable[[int, int, int, Sequence[int], Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One rank's input. expert_TK is int64, -1 for what must not travel; its weights there are NaN."""

    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor


def tokens(
    kind: str | Kind, seed: int, rank: int, count: int, *, hidden_size: int, num_experts: int, top_k: int,
    home: Sequence[int], dtype: torch.dtype = torch.float32,
) -> Tokens:  # fmt: skip
    """`count` tokens of a rank. `home` are the experts that a kind aims at, if it aims at any."""
    generator = Generator().manual_seed(seed * 1009 + rank)
    x_TD = torch.randn((count, hidden_size), generator=generator).to(dtype)
    draw = KINDS[kind] if isinstance(kind, str) else kind
    expert_TK = draw(count, num_experts, top_k, home, generator)
    weight_TK = torch.rand((count, top_k), generator=generator) + 0.1
    weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
    x_TD[(expert_TK < 0).all(dim=1)] = torch.nan  # padding holds whatever it held before
    return Tokens(x_TD, expert_TK, weight_TK.masked_fill(expert_TK < 0, torch.nan))


def uniform(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """K different experts a token, all equally likely."""
    return torch.rand((T, E), generator=generator).argsort(dim=1)[:, :K]


def hot_expert(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """One expert is among every token's K, at a random place; the others are uniform."""
    score_TE = torch.rand((T, E), generator=generator)
    score_TE[:, home[0]] = -1
    expert_TK = score_TE.argsort(dim=1)[:, :K]
    order_TK = torch.rand((T, K), generator=generator).argsort(dim=1)
    return expert_TK.gather(1, order_TK)


def one_rank(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """All tokens of all ranks go to the rank that holds the home experts; K places, repeated if there are fewer."""
    own = torch.tensor(list(home))
    return own[torch.rand((T, max(len(own), K)), generator=generator).argsort(dim=1)[:, :K] % len(own)]


def repeated(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """A token may name an expert several times; every third names one K times."""
    expert_TK = torch.randint(0, E, (T, K), generator=generator)
    expert_TK[::3] = expert_TK[::3, :1]
    return expert_TK


def dropped(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """A third of the slots do not travel, and every fourth token is padding: none of its slots travels."""
    expert_TK = uniform(T, E, K, home, generator)
    expert_TK[torch.rand((T, K), generator=generator) < 1 / 3] = -1
    expert_TK[::4] = -1
    return expert_TK


def skewed(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """The first expert is the busiest and the last nearly idle (Zipf with exponent 1)."""
    return _simulated("zipf", T, E, K, generator)


@dataclass(frozen=True)
class Imbalanced:
    """The first of `num_ranks` ranks, with experts in order, gets (1 + ratio) times the mean."""

    ratio: float
    num_ranks: int

    def __call__(self, T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
        return _simulated(f"imbalance:{self.ratio}", T, E, K, generator, self.num_ranks)


def mixed(T: int, E: int, K: int, home: Sequence[int], generator: Generator) -> Tensor:
    """One of the other kinds, drawn anew in each call."""
    kinds = [kind for name, kind in KINDS.items() if name != "mixed"]
    return kinds[int(torch.randint(len(kinds), (1,), generator=generator))](T, E, K, home, generator)


def _simulated(strategy: str, T: int, E: int, K: int, generator: Generator, num_ranks: int = 1) -> Tensor:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return simulated(strategy, E, K, num_ranks, seed)(torch.empty((T, E)))[0]


KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (uniform, hot_expert, one_rank, repeated, dropped, skewed, mixed)
}
