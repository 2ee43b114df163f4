"""Rules of the router against transformers' routers, and what they do at their edges."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from nonet.moe.router import Groups, scored_topk, softmax_topk

TOKENS, HIDDEN, EXPERTS = 200, 16, 24


def theirs(router: torch.nn.Module, bias_E: torch.Tensor | None = None):
    """(logits, dense weights [T, E]) of random rows through a router with random weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.5)
        if bias_E is not None:
            router.e_score_correction_bias.copy_(bias_E)
        logits_TE, weight_TK, expert_TK = router(torch.randn(TOKENS, HIDDEN, generator=generator))
    return logits_TE, dense(expert_TK, weight_TK)


def dense(expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    assert expert_TK.dtype == torch.int64
    assert weight_TK.dtype == torch.float32
    return torch.zeros(len(expert_TK), EXPERTS).scatter_(1, expert_TK, weight_TK)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 2), (8, 3), (12, 12)])
def test_deepseek_v3_is_theirs(count, kept, renormalise):
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=6, n_group=count, topk_group=kept,
        norm_topk_prob=renormalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    bias_E = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2)) * 0.3
    logits_TE, wanted_TE = theirs(DeepseekV3TopkRouter(config), bias_E)
    groups = None if kept == count else Groups(count, kept, best=2)
    rule = scored_topk(6, "sigmoid", bias_E=bias_E, groups=groups, renormalise=renormalise, scale=2.5)
    torch.testing.assert_close(dense(*rule(logits_TE)), wanted_TE, atol=1e-6, rtol=1e-6)
    unbiased = scored_topk(6, "sigmoid", groups=groups, renormalise=renormalise, scale=2.5)
    assert not torch.allclose(dense(*unbiased(logits_TE)), wanted_TE)


@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize(("method", "count", "kept"), [("greedy", 1, 1), ("group_limited_greedy", 6, 2)])
def test_deepseek_v2_is_theirs(method, count, kept, scale):
    config = DeepseekV2Config(
        hidden_size=HIDDEN, num_attention_heads=4, n_routed_experts=EXPERTS, num_experts_per_tok=5, n_group=count,
        topk_group=kept, topk_method=method, routed_scaling_factor=scale,
    )  # fmt: skip
    logits_TE, wanted_TE = theirs(DeepseekV2TopkRouter(config))
    groups = Groups(count, kept, best=1) if method == "group_limited_greedy" else None
    rule = scored_topk(5, "softmax", groups=groups, renormalise=False, scale=scale)
    torch.testing.assert_close(dense(*rule(logits_TE)), wanted_TE, atol=1e-6, rtol=1e-5)


def test_no_token_leaves_the_groups_that_are_kept():
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    expert_TK, _ = scored_topk(8, "sigmoid", groups=Groups(6, 2, best=2), renormalise=True)(logits_TE)
    assert all(len(set(row)) == 8 for row in expert_TK.tolist())
    assert all(len({expert // 4 for expert in row}) == 2 for row in expert_TK.tolist())


def test_scores_of_zero_are_no_division_by_zero():
    """Sigmoids of logits far below zero; softmax always has one above."""
    expert_TK, weight_TK = scored_topk(3, "sigmoid", renormalise=True)(torch.full((2, EXPERTS), -200.0))
    assert torch.equal(weight_TK, torch.zeros(2, 3))
    assert ((expert_TK >= 0) & (expert_TK < EXPERTS)).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    rule = scored_topk(3, "sigmoid", groups=Groups(4, 2, best=2), renormalise=True)
    expert_TK, weight_TK = rule(torch.randn(rows, EXPERTS))
    assert (expert_TK.shape, weight_TK.shape) == ((rows, 3), (rows, 3))


def test_plain_softmax_is_the_rule_of_that_name():
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        scored_topk(4, "softmax", renormalise=True)(logits_TE), softmax_topk(4, True)(logits_TE), strict=True
    ):
        assert torch.equal(a, b)
