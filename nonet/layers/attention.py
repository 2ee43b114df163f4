"""Grouped-query attention over the paged KV cache, heads split over the tensor-parallel ranks.

The part that reads the cache is `attend`, plain PyTorch: the reference, and the path on CPUs.
Legend: T tokens, H query heads, h KV heads, d head_dim, D hidden, B decoding sequences, C longest context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels.linear import linear, pack
from nonet.layers.norm import rms_norm
from nonet.layers.rope import rotate
from nonet.weights.loader import Checkpoint

KvCache = tuple[Tensor, Tensor]  # keys and values of a layer, each [num_blocks * block_size, h, d]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence's new tokens `first : first + count` of the step, and where its whole context lies."""

    first: int
    count: int
    place_C: Tensor  # int64 cache places of positions 0 .. context - 1


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where a step's tokens go in the cache, and what each may see. Decoding sequences come first, a token each."""

    place_T: Tensor  # int64 cache place of each new token
    num_decode: int
    decode_place_BC: Tensor  # int64
    decode_mask_B11C: Tensor  # bool: True where there is context
    prefills: tuple[Prefill, ...]


class Attention:
    """q, k, v projections, optional norms of q and k by head, rope, attention, output projection.

    `forward` returns this rank's part of the sum over heads: [T, D], to be reduced over the tensor-parallel ranks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        *,
        heads: tuple[int, int],
        kv_heads: tuple[int, int],
        head_dim: int,
        norm_eps: float | None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads[1] - heads[0], kv_heads[1] - kv_heads[0], head_dim
        q_rows = (heads[0] * head_dim, heads[1] * head_dim)
        kv_rows = (kv_heads[0] * head_dim, kv_heads[1] * head_dim)
        parts = (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        self.qkv = pack(torch.cat([checkpoint.read(f"{prefix}.{n}_proj.weight", rows=rows) for n, rows in parts]))
        self.bias = None
        if f"{prefix}.q_proj.bias" in checkpoint:
            self.bias = torch.cat([checkpoint.read(f"{prefix}.{n}_proj.bias", rows=rows) for n, rows in parts])
        self.out = pack(checkpoint.read(f"{prefix}.o_proj.weight", columns=q_rows))
        self.out_bias = None
        if heads[0] == 0 and f"{prefix}.o_proj.bias" in checkpoint:  # on one rank: the parts are summed
            self.out_bias = checkpoint.read(f"{prefix}.o_proj.bias")
        self.norm_eps = norm_eps
        if norm_eps is not None:
            q, k = (checkpoint.expect(f"{prefix}.{n}_norm.weight", (head_dim,)) for n in ("q", "k"))
            self.qk_norm = torch.cat([q.expand(self.num_heads, -1), k.expand(self.num_kv_heads, -1)])

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: AttentionBatch) -> Tensor:
        T, H, h = x_TD.shape[0], self.num_heads, self.num_kv_heads
        qkv = linear(x_TD, self.qkv, self.bias).view(T, H + 2 * h, self.head_dim)
        qk, v_Thd = qkv[:, : H + h], qkv[:, H + h :]
        if self.norm_eps is not None:
            qk = rms_norm(qk, self.qk_norm, self.norm_eps)
        qk = rotate(qk, *cos_sin)
        cache[0].index_copy_(0, batch.place_T, qk[:, H:])
        cache[1].index_copy_(0, batch.place_T, v_Thd)
        y_THd = attend(qk[:, :H], cache, batch)
        return linear(y_THd.reshape(T, H * self.head_dim), self.out, self.out_bias)


def attend(q_THd: Tensor, cache: KvCache, batch: AttentionBatch) -> Tensor:
    """[T, H, d]: each token attends to its sequence up to itself."""
    T, H, d = q_THd.shape
    h = cache[0].shape[1]
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    B = batch.num_decode
    if B:
        place = batch.decode_place_BC.view(-1)
        k, v = (part.index_select(0, place).view(B, -1, h, d).transpose(1, 2) for part in cache)  # [B, h, C, d]
        q = q_THd[:B].reshape(B, h, H // h, d)  # the heads of a group attend alike: they stand as its queries
        out[:B] = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.decode_mask_B11C).reshape(B, H, d)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        out[rows] = _attend_one(q_THd[rows], cache, part)
    return out


def _attend_one(q_THd: Tensor, cache: KvCache, part: Prefill) -> Tensor:
    """A chunk of a prompt against the context that ends with it."""
    q = q_THd.transpose(0, 1).unsqueeze(0)
    k, v = (rows.index_select(0, part.place_C).transpose(0, 1).unsqueeze(0) for rows in cache)
    gqa = q.shape[1] != k.shape[1]
    context = part.place_C.shape[0]
    if context == part.count:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        mask = torch.ones((part.count, context), dtype=torch.bool, device=q.device).tril(context - part.count)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return y[0].transpose(0, 1)
