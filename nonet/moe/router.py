"""Picks experts for a token. Each family's rule is a function; simulated routing replaces it for benchmarks.

Used by models, which hand one to the MoE layer. Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nonet.kernels import cpu
from nonet.kernels import triton as gpu

Choice = tuple[Tensor, Tensor]  # expert_TK int64, weight_TK float32
Rule = Callable[[Tensor], Choice]  # from logits_TE


def softmax_topk(top_k: int, renormalise: bool) -> Rule:
    """Softmax over all experts in float32, the K largest, renormalised if asked (Qwen3-MoE, Mixtral)."""

    def rule(logits_TE: Tensor) -> Choice:
        if cpu.handles(logits_TE):
            from nonet.kernels.cpu import routing

            return routing.softmax_topk(logits_TE, top_k, renormalise)
        if gpu.handles(logits_TE):
            from nonet.kernels.triton import routing as on_gpu

            return on_gpu.topk(logits_TE, top_k, renormalise=renormalise)
        return softmax_topk_reference(logits_TE, top_k, renormalise)

    return rule


def softmax_topk_reference(logits_TE: Tensor, top_k: int, renormalise: bool) -> Choice:
    """The specification of the rule above."""
    weight_TK, expert_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return expert_TK, weight_TK


@dataclass(frozen=True, slots=True)
class Groups:
    """Experts in `count` groups of neighbours, of which a token may use `kept`: those whose `best` highest scores sum
    to most. DeepSeek-V2 (best 1) and V3 (best 2) bound the nodes a token travels to by it."""

    count: int
    kept: int
    best: int


def scored_topk(
    top_k: int,
    scoring: Literal["softmax", "sigmoid"],
    *,
    bias_E: Tensor | None = None,
    groups: Groups | None = None,
    renormalise: bool,
    scale: float = 1.0,
) -> Rule:
    """The K best by score + bias out of the groups that are kept; weights are scores without bias, times `scale`.

    The rule of DeepSeek-V2 (arXiv:2405.04434, section 2.1) and V3 (arXiv:2412.19437, section 2.1); `bias_E` is V3's
    correction that balances load, float32.
    """
    if scoring == "softmax" and bias_E is None and groups is None and scale == 1:
        return softmax_topk(top_k, renormalise)

    def rule(logits_TE: Tensor) -> Choice:
        if gpu.handles(logits_TE):
            from nonet.kernels.triton import routing

            bounds = (1, 1, 1) if groups is None else (groups.count, groups.kept, groups.best)
            return routing.topk(
                logits_TE, top_k, sigmoid=scoring == "sigmoid", bias_E=bias_E, groups=bounds, renormalise=renormalise,
                scale=scale,
            )  # fmt: skip
        return scored_topk_reference(logits_TE, top_k, scoring, bias_E, groups, renormalise, scale)

    return rule


def scored_topk_reference(
    logits_TE: Tensor,
    top_k: int,
    scoring: Literal["softmax", "sigmoid"],
    bias_E: Tensor | None,
    groups: Groups | None,
    renormalise: bool,
    scale: float,
) -> Choice:
    """The specification of the rule above."""
    logits_TE = logits_TE.float()
    score_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(dim=-1)
    worth_TE = score_TE if bias_E is None else score_TE + bias_E
    if groups is not None:
        worth_TE = _only_kept(worth_TE, groups)
    expert_TK = worth_TE.topk(top_k, dim=-1).indices
    weight_TK = score_TE.gather(1, expert_TK)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
    return expert_TK, weight_TK * scale


def _only_kept(worth_TE: Tensor, groups: Groups) -> Tensor:
    """The worth of experts in groups that are not kept becomes minus infinity."""
    worth_TGe = worth_TE.unflatten(1, (groups.count, -1))  # e experts of a group
    group_TG = worth_TGe.topk(groups.best, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, group_TG.topk(groups.kept, dim=-1).indices, True)
    return worth_TGe.masked_fill(~kept_TG.unsqueeze(2), -torch.inf).flatten(1)
