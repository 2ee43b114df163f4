"""Picks experts for a token. Each family's rule is a function; simulated routing replaces it for benchmarks.

Used by models, which hand one to the MoE layer. Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nonet.kernels import cpu

Choice = tuple[Tensor, Tensor]  # expert_TK int64, weight_TK float32
Rule = Callable[[Tensor], Choice]  # from logits_TE


def softmax_topk(top_k: int, renormalise: bool) -> Rule:
    """Softmax over all experts in float32, the K largest, renormalised if asked (Qwen3-MoE, Mixtral)."""

    def rule(logits_TE: Tensor) -> Choice:
        if cpu.handles(logits_TE):
            from nonet.kernels.cpu import routing

            return routing.softmax_topk(logits_TE, top_k, renormalise)
        return softmax_topk_reference(logits_TE, top_k, renormalise)

    return rule


def softmax_topk_reference(logits_TE: Tensor, top_k: int, renormalise: bool) -> Choice:
    """The specification of the rule above."""
    weight_TK, expert_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return expert_TK, weight_TK
