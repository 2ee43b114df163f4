"""Simulated routing: experts are drawn instead of computed, to benchmark a wanted load. Outputs are meaningless.

Chosen by `routing_simulation`; the strategies are parsed once, at start. Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nonet.errors import ConfigError, nearest
from nonet.moe.router import Choice, Rule


def simulated(strategy: str, num_experts: int, top_k: int, num_ranks: int, seed: int) -> Rule:
    """A rule for `uniform_random`, `round_robin`, `zipf[:exponent]` or `imbalance:<ratio>`. Raises ConfigError.

    round_robin is exact: consecutive tokens take consecutive experts, so counts differ by at most one. imbalance:r
    aims at (max - mean) / mean = r over `num_ranks` ranks with experts in order, the first being the hottest.
    Weights are 1 / K.
    """
    name, _, argument = strategy.partition(":")
    if name == "round_robin" and not argument:
        return _RoundRobin(num_experts, top_k)
    makers: dict[str, Callable[[float | None], Tensor]] = {
        "uniform_random": lambda _: torch.ones(num_experts),
        "zipf": lambda exponent: torch.arange(1, num_experts + 1).float() ** -(1.0 if exponent is None else exponent),
        "imbalance": lambda ratio: _imbalance(ratio, num_experts, top_k, num_ranks, strategy),
    }
    if name not in makers or (argument and name == "uniform_random"):
        raise ConfigError("routing_simulation", strategy, nearest(name, [*makers, "round_robin"]))
    try:
        number = float(argument) if argument else None
    except ValueError:
        raise ConfigError("routing_simulation", strategy, f"{argument!r} is not a number") from None
    return (_Quota if name == "imbalance" else _Drawn)(makers[name](number), top_k, seed)


def _imbalance(ratio: float | None, num_experts: int, top_k: int, num_ranks: int, strategy: str) -> Tensor:
    """Share of each expert so that rank 0 gets (1 + ratio) times the mean."""
    most = num_ranks - 1
    if ratio is None or not 0 <= ratio <= most:
        raise ConfigError("routing_simulation", strategy, f"the ratio over {num_ranks} ranks is between 0 and {most}")
    if num_ranks == 1:
        return torch.ones(num_experts)
    first = -(-num_experts // num_ranks)
    hot = (1 + ratio) / num_ranks
    if hot * top_k > first:
        limit = first * num_ranks / top_k - 1
        remedy = f"rank 0 has {first} experts for top-{top_k}: at most {limit:g}"
        raise ConfigError("routing_simulation", strategy, remedy)
    share = torch.full((num_experts,), (1 - hot) / (num_experts - first))
    share[:first] = hot / first
    return share


class _RoundRobin:
    """Counts tokens on the host, so that the next call goes on where the last one ended."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k, self.next = num_experts, top_k, 0

    def __call__(self, logits_TE: Tensor) -> Choice:
        T = logits_TE.shape[0]
        flat = torch.arange(self.next, self.next + T * self.top_k, device=logits_TE.device) % self.num_experts
        self.next = (self.next + T * self.top_k) % self.num_experts
        return flat.view(T, self.top_k), _equal_weights(T, self.top_k, logits_TE)


class _Drawn:
    """K experts a token without replacement. Systematic sampling: expert e is drawn with probability K * share[e]."""

    def __init__(self, share_E: Tensor, top_k: int, seed: int) -> None:
        self.top_k = top_k
        self.inclusion_E = _inclusion(share_E / share_E.sum(), top_k)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_TE: Tensor) -> Choice:
        T, E = logits_TE.shape[0], len(self.inclusion_E)
        order_TE = torch.rand((T, E), generator=self.generator).argsort(dim=1)  # a fresh order decorrelates neighbours
        edge_TE = self.inclusion_E[order_TE].cumsum(dim=1)
        points_TK = torch.rand((T, 1), generator=self.generator) + torch.arange(self.top_k)
        place_TK = torch.searchsorted(edge_TE, points_TK.clamp(max=self.top_k - 1e-4), right=True).clamp(max=E - 1)
        expert_TK = order_TE.gather(1, place_TK).to(logits_TE.device)
        return expert_TK, _equal_weights(T, self.top_k, logits_TE)


class _Quota:
    """K experts a token so that counts follow the shares closely in every step: systematic sampling in one random
    order of the experts, its offset walking by the golden ratio (a low-discrepancy sequence)."""

    def __init__(self, share_E: Tensor, top_k: int, seed: int) -> None:
        self.top_k, self.next = top_k, 0
        generator = torch.Generator().manual_seed(seed)
        self.order_E = torch.randperm(len(share_E), generator=generator)
        self.edge_E = _inclusion(share_E / share_E.sum(), top_k)[self.order_E].double().cumsum(0)
        self.offset = float(torch.rand(1, generator=generator))

    def __call__(self, logits_TE: Tensor) -> Choice:
        T = logits_TE.shape[0]
        walk_T = torch.arange(self.next, self.next + T, dtype=torch.float64) * 0.6180339887498949 + self.offset
        self.next += T
        points_TK = (walk_T % 1).unsqueeze(1) + torch.arange(self.top_k)
        place_TK = torch.searchsorted(self.edge_E, points_TK, right=True).clamp(max=len(self.order_E) - 1)
        return self.order_E[place_TK].to(logits_TE.device), _equal_weights(T, self.top_k, logits_TE)


def _inclusion(share_E: Tensor, top_k: int) -> Tensor:
    """Probability that a token takes each expert: K * share, at most 1, the excess spread over the others."""
    inclusion = share_E * top_k
    for _ in range(len(share_E)):
        over = inclusion >= 1
        rest = top_k - over.sum()
        scaled = torch.where(over, 1.0, share_E * rest / share_E[~over].sum().clamp(min=1e-12))
        if torch.equal(scaled >= 1, over):
            return scaled
        inclusion = torch.maximum(scaled, over.float())
    return inclusion


def _equal_weights(num_tokens: int, top_k: int, like: Tensor) -> Tensor:
    return torch.full((num_tokens, top_k), 1.0 / top_k, device=like.device)
