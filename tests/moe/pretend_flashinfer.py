"""A stand-in for FlashInfer's one-sided all-to-all on CPU ranks, over gloo: what the adapter uses, and what it asserts.

Written from flashinfer/comm/trtllm_moe_alltoall.py and its kernels, version 0.6.12. What is undefined there is full of
ones here, which is NaN.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TOP_K = (1, 2, 4, 6, 8, 10, 16, 22)


def moe_a2a_get_workspace_size_per_rank(
    ep_size: int, max_num_tokens: int, total_dispatch_payload_size_per_token: int, combine_payload_size_per_token: int
) -> int:
    parts = total_dispatch_payload_size_per_token, combine_payload_size_per_token
    return sum(-(-ep_size * max_num_tokens * part // 128) * 128 for part in parts)


class Mapping(SimpleNamespace):
    """Its fields."""


class MnnvlConfig(SimpleNamespace):
    """Its fields."""


class MoeAlltoAll:
    """Here the workspace is this object itself."""

    def __init__(
        self, mapping: Any, max_num_tokens: int, top_k: int, num_experts: int, workspace_size_per_rank: int,
        mnnvl_config: Any,
    ) -> None:  # fmt: skip
        self.size, self.rank = mapping.moe_ep_size, mapping.rank
        self.comm = mnnvl_config.comm_backend.Split(0, self.rank)
        assert (self.comm.Get_size(), self.comm.Get_rank()) == (self.size, self.rank)
        assert mapping.tp_size == mapping.world_size == self.size
        assert mapping.moe_tp_size == 1
        assert len(set(self.comm.allgather(workspace_size_per_rank))) == 1, "Not all rank allocating same size."
        self.most, self.space, self.sent = max_num_tokens, workspace_size_per_rank, None
        self.workspace, self.metainfo = self, None

    def _reset_workspace(self) -> None:
        self.comm.barrier()


def moe_a2a_dispatch(
    token_selected_experts: Tensor, input_payloads: list[Tensor], workspace: MoeAlltoAll, metainfo: None,
    runtime_max_tokens_per_rank: int, ep_rank: int, ep_size: int, top_k: int, num_experts: int,
) -> tuple[list[Tensor], int]:  # fmt: skip
    most, T, own = runtime_max_tokens_per_rank, len(token_selected_experts), workspace
    assert (ep_rank, ep_size, own.sent) == (own.rank, own.size, None)
    assert T <= most <= own.most
    assert top_k in TOP_K
    assert num_experts % ep_size == 0
    assert token_selected_experts.dtype == torch.int32
    assert token_selected_experts.shape == (T, top_k)
    assert 1 <= len(input_payloads) <= 4
    assert all(p.is_contiguous() and p.ndim == 2 and p.shape[0] == T for p in input_payloads)
    widths = [p.shape[1] * p.dtype.itemsize for p in input_payloads]
    at = 0
    for width in widths:  # each thread moves as much at once as divides the width
        assert at % min(16, width & -width) == 0, "misaligned"
        at += ep_size * most * width
    assert at <= own.space
    assert (token_selected_experts >= 0).all(), "an id below zero would be divided towards zero"
    target_TK = token_selected_experts // (num_experts // ep_size)
    assert (target_TK < ep_size).all()
    order = [(target_TK == r).any(1).nonzero()[:, 0].flip(0) for r in range(ep_size)]  # in any order: a counter's
    everyone = own.comm.allgather([[p[o] for p in input_payloads] for o in order])
    out = []
    for i, payload in enumerate(input_payloads):
        room = torch.full((ep_size, most, widths[i]), 255, dtype=torch.uint8).view(payload.dtype)
        for source, parts in enumerate(everyone):
            room[source, : len(parts[ep_rank][i])] = parts[ep_rank][i]
        out.append(room)
    own.sent = order, T, most, [len(parts[ep_rank][0]) for parts in everyone], at
    return out, at


def moe_a2a_sanitize_expert_ids(
    expert_ids: Tensor, workspace: MoeAlltoAll, metainfo: None, ep_rank: int, invalid_expert_id: int
) -> None:
    assert expert_ids.dtype == torch.int32
    assert expert_ids.ndim == 3
    for source, count in enumerate(workspace.sent[3]):
        expert_ids[source, count:] = invalid_expert_id


def moe_a2a_combine(
    payload: Tensor, local_num_tokens: int, workspace: MoeAlltoAll, metainfo: None, runtime_max_tokens_per_rank: int,
    ep_rank: int, ep_size: int, top_k: int, combine_payload_offset: int,
) -> Tensor:  # fmt: skip
    order, T, most, _, received = workspace.sent
    assert (T, most) == (local_num_tokens, runtime_max_tokens_per_rank)
    assert payload.shape[:2] == (ep_size, most)
    assert payload.is_contiguous()
    assert received <= combine_payload_offset
    assert combine_payload_offset % 128 == 0
    assert combine_payload_offset + payload.nbytes <= workspace.space
    everyone = workspace.comm.allgather(payload)
    out = torch.zeros((T, payload.shape[2]), dtype=payload.dtype)
    for r, rows in enumerate(order):
        out[rows] += everyone[r][ep_rank, : len(rows)]
    workspace.sent = None
    return out
