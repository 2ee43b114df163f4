"""Grouped-query attention over the paged KV cache, heads split over the tensor-parallel ranks.

`place_qkv` writes the cache, `attend` reads it. Both are plain PyTorch, the reference; on CPUs compiled kernels do the
same in one pass over the rows, but for prompts, which are PyTorch's everywhere.
Legend: T tokens, H query heads, h KV heads, d head_dim, D hidden, B decoding sequences, C longest context,
N blocks of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels import cpu
from nonet.kernels.linear import linear, pack
from nonet.layers.norm import rms_norm_reference
from nonet.layers.rope import rotate
from nonet.weights.loader import Checkpoint

KvCache = tuple[Tensor, ...]  # keys and values of a layer, each [num_blocks * block_size, h, d]


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
    decode_block_BN: Tensor  # int64: the blocks of each context; past its end a row repeats its first
    decode_length_B: Tensor  # int64: context of each, its own token included
    block_size: int
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
        self.qk_norm: tuple[Tensor, float] | None = None
        if norm_eps is not None:
            q, k = (checkpoint.expect(f"{prefix}.{n}_norm.weight", (head_dim,)) for n in ("q", "k"))
            self.qk_norm = torch.cat([q.expand(self.num_heads, -1), k.expand(self.num_kv_heads, -1)]), norm_eps

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: AttentionBatch) -> Tensor:
        T, H, h = x_TD.shape[0], self.num_heads, self.num_kv_heads
        qkv = linear(x_TD, self.qkv, self.bias).view(T, H + 2 * h, self.head_dim)
        if cpu.handles(qkv):
            from nonet.kernels.cpu import attention

            q_THd = attention.place_qkv(qkv, self.qk_norm, cos_sin, cache, batch.place_T, H)
        else:
            q_THd = place_qkv(qkv, self.qk_norm, cos_sin, cache, batch.place_T, H)
        y_THd = attend(q_THd, cache, batch)
        return linear(y_THd.reshape(T, H * self.head_dim), self.out, self.out_bias)


def place_qkv(
    qkv: Tensor,
    norm: tuple[Tensor, float] | None,
    cos_sin: tuple[Tensor, Tensor],
    cache: KvCache,
    place_T: Tensor,
    num_heads: int,
) -> Tensor:
    """q [T, H, d], normed and rotated, of qkv [T, H + 2h, d]; k, also so, and v go to their places in the cache.

    `norm` is (weights [H + h, d], epsilon); cos and sin are [T, 1, d].
    """
    h = cache[0].shape[1]
    qk, v_Thd = qkv[:, :-h], qkv[:, -h:]
    if norm is not None:
        qk = rms_norm_reference(qk, *norm)
    qk = rotate(qk, *cos_sin)
    cache[0].index_copy_(0, place_T, qk[:, num_heads:])
    cache[1].index_copy_(0, place_T, v_Thd)
    return qk[:, :num_heads]


def attend(q_THd: Tensor, cache: KvCache, batch: AttentionBatch) -> Tensor:
    """[T, H, d]: each token attends to its sequence up to itself."""
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    B = batch.num_decode
    if B and cpu.handles(q_THd):
        from nonet.kernels.cpu import attention

        attention.decode(q_THd[:B], cache, batch.decode_block_BN, batch.decode_length_B, batch.block_size, out[:B])
    elif B:
        out[:B] = decode(q_THd[:B], cache, batch.decode_block_BN, batch.decode_length_B, batch.block_size)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        out[rows] = _attend_one(q_THd[rows], cache, part)
    return out


def decode(q_BHd: Tensor, cache: KvCache, block_BN: Tensor, length_B: Tensor, block_size: int) -> Tensor:
    """[B, H, d]: each sequence's one token attends to its context."""
    B, H, d = q_BHd.shape
    h, C = cache[0].shape[1], block_BN.shape[1] * block_size
    place_BC = (block_BN.unsqueeze(2) * block_size + torch.arange(block_size, device=q_BHd.device)).view(B, C)
    k, v = (part.index_select(0, place_BC.view(-1)).view(B, C, h, d).transpose(1, 2) for part in cache)
    q = q_BHd.reshape(B, h, H // h, d)  # the heads of a group attend alike: they stand as its queries
    mask_BC = torch.arange(C, device=q.device) < length_B.unsqueeze(1)
    k, v = (part.masked_fill(~mask_BC[:, None, :, None], 0) for part in (k, v))  # there NaN may stand
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BC[:, None, None, :]).reshape(B, H, d)


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
