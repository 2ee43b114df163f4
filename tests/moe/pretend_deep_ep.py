"""A stand-in for DeepEP on CPU ranks, over gloo: its documented interface and what its kernels promise, slowly.

Written from the documentation of deep_ep.Buffer (README.md and the docstrings of deep_ep/buffer.py, version 1.2): which
arguments are taken, what is returned, what is asserted. What is undefined there is NaN here, rows of one slot come in
random order, and what a hook receives is not there before the hook ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FP8, BLOCK = torch.float8_e4m3fn, 128


@dataclass(frozen=True)
class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks > 8, "asked for only where ranks stand on several hosts"
        return hidden_bytes * num_ranks


class EventOverlap:
    pass


class Buffer:
    """One exchange under way at a time is all that is pretended; low latency may hold two results."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        explicitly_destroy: bool = False,
    ) -> None:
        assert isinstance(group, dist.ProcessGroup)
        assert num_rdma_bytes > 0 if low_latency_mode else num_nvl_bytes > 0
        self.group, self.low_latency_mode, self.is_open = group, low_latency_mode, True
        self.rank, self.size = group.rank(), group.size()
        self.explicitly_destroy, self.num_rdma_bytes, self.qps = explicitly_destroy, num_rdma_bytes, num_qps_per_rank
        self.generator = torch.Generator().manual_seed(self.rank)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return num_max_dispatch_tokens_per_rank * hidden * num_ranks * num_experts

    def destroy(self) -> None:
        assert self.explicitly_destroy
        assert self.is_open
        self.is_open = False

    # -- many tokens ----------------------------------------------------------------------------------------------

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert num_experts % self.size == 0
        per = num_experts // self.size
        is_in = torch.stack([(topk_idx // per == r).logical_and(topk_idx >= 0).any(1) for r in range(self.size)], 1)
        by_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return is_in.sum(0).int(), None, by_expert.int(), is_in, EventOverlap()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        values, scales = x if isinstance(x, tuple) else (x, None)
        assert self.is_open
        assert not self.low_latency_mode
        assert handle is None
        assert num_tokens_per_rdma_rank is None
        assert values.dtype == (torch.bfloat16 if scales is None else FP8)
        assert values.is_contiguous()
        assert len(values)
        assert scales is None or scales.dtype == torch.float32 and scales.shape == (len(values), values.shape[1] // 128)
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_idx is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert num_tokens_per_rank is not None
        counts = num_tokens_per_rank.tolist()
        come = self._exchange_counts(counts)
        token_P = torch.cat([is_token_in_rank[:, r].nonzero()[:, 0] for r in range(self.size)])

        def move(rows: Tensor) -> Tensor:
            return self._move(rows.index_select(0, token_P), counts, come)

        idx, weights, per = move(topk_idx), move(topk_weights), len(num_tokens_per_expert) // self.size
        here = (idx >= 0) & (idx // per == self.rank)
        received = move(values.view(torch.uint8)).view(values.dtype)
        handle = (token_P, counts, come, len(values))
        by_expert = torch.bincount(idx[here] % per, minlength=per).tolist()
        both = received if scales is None else (received, move(scales))
        local = torch.where(here, idx - self.rank * per, -1)
        return both, local, torch.where(here, weights, 0), by_expert, handle, EventOverlap()

    def combine(self, x: Tensor, handle: Any) -> tuple[Tensor, None, EventOverlap]:
        token_P, counts, come, num_tokens = handle
        assert self.is_open
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert len(x) == sum(come)
        back = self._move(x, come, counts)
        out = torch.zeros((num_tokens, x.shape[1])).index_add_(0, token_P, back.float())
        return out.to(torch.bfloat16), None, EventOverlap()

    # -- few tokens -----------------------------------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        return_recv_hook: bool = False,
    ) -> tuple[Any, ...]:
        assert self.is_open
        assert self.low_latency_mode
        assert return_recv_hook
        assert num_experts % self.size == 0
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[1] % 128 == 0
        assert 0 < len(x) <= num_max_dispatch_tokens_per_rank
        assert len(topk_idx) == len(x)
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        per, D = num_experts // self.size, x.shape[1]
        places = num_max_dispatch_tokens_per_rank * self.size
        hint = self.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, D, self.size, num_experts)
        assert self.num_rdma_bytes >= hint
        assert self.qps == per
        out = torch.full((per, places, D), torch.nan, dtype=torch.bfloat16)
        numbers, factors = out, None
        if use_fp8:
            numbers = torch.full((per, places, D), 255, dtype=torch.uint8).view(FP8)
            factors = torch.full((per, D // BLOCK, places), torch.nan).transpose(1, 2)  # as TMA likes it
        count = torch.full((per,), -1, dtype=torch.int32)
        pair_P = torch.argsort(topk_idx.flatten().masked_fill(topk_idx.flatten() < 0, num_experts), stable=True)
        pair_P = pair_P[: int((topk_idx >= 0).sum())]
        target_P = topk_idx.flatten()[pair_P] // per
        counts = torch.bincount(target_P, minlength=self.size).tolist()
        come = self._exchange_counts(counts)
        handle = {"places": [], "pairs": pair_P, "counts": counts, "come": come, "hooked": False}

        def hook() -> None:
            rows = self._move(x.index_select(0, pair_P // topk_idx.shape[1]), counts, come)
            expert = self._move(topk_idx.flatten()[pair_P], counts, come) - self.rank * per
            count.copy_(torch.bincount(expert, minlength=per))
            at = torch.zeros(len(rows), dtype=torch.int64)
            for e in range(per):
                own = (expert == e).nonzero()[:, 0]
                at[own] = e * places + torch.randperm(len(own), generator=self.generator)
            if factors is None:
                numbers.view(-1, D)[at] = rows
            else:
                parts = rows.float().view(len(rows), D // BLOCK, BLOCK)
                scale = parts.abs().amax(2).clamp(1e-4) / 448
                numbers.view(torch.uint8).view(-1, D)[at] = (
                    (parts / scale[..., None]).to(FP8).view(-1, D).view(torch.uint8)
                )
                factors[at // places, at % places] = scale
            handle.update(places=at, hooked=True)

        return (numbers if factors is None else (numbers, factors)), count, handle, EventOverlap(), hook

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, return_recv_hook: bool = False
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        assert self.is_open
        assert handle["hooked"]
        assert return_recv_hook
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert topk_weights.dtype == torch.float32
        assert topk_idx.dtype == torch.int64
        assert topk_weights.is_contiguous()
        out = torch.full((len(topk_idx), x.shape[2]), torch.nan, dtype=torch.bfloat16)

        def hook() -> None:
            back = self._move(x.flatten(0, 1)[handle["places"]], handle["come"], handle["counts"])
            pairs = torch.zeros((topk_idx.numel(), x.shape[2]))
            pairs[handle["pairs"]] = back.float() * topk_weights.flatten()[handle["pairs"]].unsqueeze(1)
            out.copy_(pairs.view(*topk_idx.shape, -1).sum(1))

        return out, EventOverlap(), hook

    # -- gloo -----------------------------------------------------------------------------------------------------

    def _exchange_counts(self, counts: list[int]) -> list[int]:
        come = torch.empty(self.size, dtype=torch.int64)
        dist.all_to_all_single(come, torch.tensor(counts), group=self.group)
        return come.tolist()

    def _move(self, rows: Tensor, counts: list[int], come: list[int]) -> Tensor:
        out = rows.new_empty((sum(come), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), come, counts, group=self.group)
        return out
