"""Grouped-query attention over the paged KV cache, heads split over the tensor-parallel ranks.

`place_qkv` writes the cache, `attend` reads it. Both are plain PyTorch, the reference; on CPUs compiled kernels do the
same in one pass over the rows, but for prompts, which are PyTorch's there; on GPUs Triton kernels do all of it, or a
library attends (`attention_flashinfer`), where the configuration names it. What a family's layers do besides, a `Sight`
and the options of `Attention` say; nobody here knows which family asks.
Legend: T tokens, H query heads, h KV heads, d head_dim, D hidden, B decoding sequences, P prompts, C longest context,
N blocks of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels import cpu
from nonet.kernels import triton as gpu
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
class Prompts:
    """The same of all prefills, on the device, for kernels that take them in one launch. All int64."""

    block_PN: Tensor  # the blocks of each context; past its end anything
    first_P: Tensor
    count_P: Tensor
    context_P: Tensor
    begin_P: Tensor  # where each begins in the next
    place_C: Tensor  # cache places of all contexts, end to end
    pairs: int  # of a new token and what it may see at most


class PlannedStep(Protocol):
    """Attention of one step by a library that plans on the host, where it was told the step's sequences."""

    def attend(self, q_THd: Tensor, cache: KvCache, sight: Sight, out: Tensor) -> None:
        """Into out [T, H, d]. Raises ConfigError for a sight that the library does not know."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where a step's tokens go in the cache, and what each may see. Decoding sequences come first, a token each."""

    place_T: Tensor  # int64 cache place of each new token
    position_T: Tensor  # int64: where in its sequence it stands
    num_decode: int
    decode_block_BN: Tensor  # int64: the blocks of each context; past its end a row repeats its first
    decode_length_B: Tensor  # int64: context of each, its own token included
    block_size: int
    prefills: tuple[Prefill, ...]
    backend: str = "reference"  # what attends: the configuration's `attention_backend`
    prompts: Prompts | None = None  # for Triton, where there are prefills
    planned: PlannedStep | None = None  # attends instead of the kernels, where the configuration names a library


@dataclass(frozen=True, slots=True)
class Sight:
    """What a token attends to. As it stands: to all of its sequence up to itself, products scaled by 1 / sqrt(d)."""

    window: int | None = None  # only to the last so many positions, its own among them
    chunk: int | None = None  # only within its own chunk of so many positions, counted from the sequence's start
    sink_H: Tensor | None = None  # float32: a logit of each head that shares in the softmax and has no value (gpt-oss)
    scale: float | None = None

    def first(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        since_window = 0 if self.window is None else position - self.window + 1
        since_chunk = 0 if self.chunk is None else position // self.chunk * self.chunk
        return max(0, since_window, since_chunk)

    def mask(self, position: Tensor, other: Tensor) -> Tensor:
        """Whether a token at `position` sees `other`; they broadcast."""
        mask = other <= position
        if self.window is not None:
            mask = mask & (other > position - self.window)
        if self.chunk is not None:
            mask = mask & (other >= position // self.chunk * self.chunk)
        return mask


PLAIN = Sight()


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries grow with their position p: by log(1 + floor((p + 1) / floor)) * scale + 1 (Nakanishi, 2025; Llama 4)."""

    floor: float
    scale: float

    def at(self, position_T: Tensor) -> Tensor:
        """[T] float32."""
        return torch.log1p(torch.floor((position_T.float() + 1) / self.floor)) * self.scale + 1


class Attention:
    """q, k, v projections, optional norms of q and k by head, rope, attention, output projection.

    `forward` returns this rank's part of the sum over heads: [T, D], to be reduced over the tensor-parallel ranks.
    norm_eps: norms of q and k by head before rope, with weights from the checkpoint, or without (`norm_weights`; as
    rope keeps lengths, that is also their norm after it). sinks: a logit for each head, from the checkpoint.
    rope: False leaves positions out. interleaved: the checkpoint's rope turns neighbouring numbers of a head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        *,
        heads: tuple[int, int],
        kv_heads: tuple[int, int],
        head_dim: int,
        norm_eps: float | None = None,
        norm_weights: bool = True,
        window: int | None = None,
        chunk: int | None = None,
        sinks: bool = False,
        scale: float | None = None,
        rope: bool = True,
        interleaved: bool = False,
        temperature: Temperature | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads[1] - heads[0], kv_heads[1] - kv_heads[0], head_dim
        self.rope, self.temperature = rope, temperature
        q_rows = (heads[0] * head_dim, heads[1] * head_dim)
        kv_rows = (kv_heads[0] * head_dim, kv_heads[1] * head_dim)
        parts = (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        turned = (self.num_heads + self.num_kv_heads) * head_dim if interleaved else 0

        def read_qkv(kind: str) -> Tensor:
            rows = torch.cat([checkpoint.read(f"{prefix}.{n}_proj.{kind}", rows=rows) for n, rows in parts])
            return torch.cat([halves(rows[:turned], head_dim), rows[turned:]]) if turned else rows

        self.qkv = pack(read_qkv("weight"))
        self.bias = read_qkv("bias") if f"{prefix}.q_proj.bias" in checkpoint else None
        self.out = pack(checkpoint.read(f"{prefix}.o_proj.weight", columns=q_rows))
        self.out_bias = None
        if heads[0] == 0 and f"{prefix}.o_proj.bias" in checkpoint:  # on one rank: the parts are summed
            self.out_bias = checkpoint.read(f"{prefix}.o_proj.bias")
        self.qk_norm: tuple[Tensor, float] | None = None
        if norm_eps is not None and norm_weights:
            q, k = (checkpoint.expect(f"{prefix}.{n}_norm.weight", (head_dim,)) for n in ("q", "k"))
            self.qk_norm = torch.cat([q.expand(self.num_heads, -1), k.expand(self.num_kv_heads, -1)]), norm_eps
        elif norm_eps is not None:
            ones = (self.num_heads + self.num_kv_heads, head_dim)
            self.qk_norm = torch.ones(ones, dtype=checkpoint.dtype, device=checkpoint.device), norm_eps
        sink_H = checkpoint.read(f"{prefix}.sinks", rows=heads).float() if sinks else None
        self.sight = Sight(window, chunk, sink_H, scale)

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: AttentionBatch) -> Tensor:
        T, H, h = x_TD.shape[0], self.num_heads, self.num_kv_heads
        qkv = linear(x_TD, self.qkv, self.bias).view(T, H + 2 * h, self.head_dim)
        if not self.rope:
            cos_sin = torch.ones_like(cos_sin[0]), torch.zeros_like(cos_sin[1])
        if cpu.handles(qkv):
            from nonet.kernels.cpu import attention

            q_THd = attention.place_qkv(qkv, self.qk_norm, cos_sin, cache, batch.place_T, H)
        elif gpu.handles(qkv):
            from nonet.kernels.triton import rope

            q_THd = rope.place_qkv(qkv, self.qk_norm, cos_sin, cache, batch.place_T, H)
        else:
            q_THd = place_qkv(qkv, self.qk_norm, cos_sin, cache, batch.place_T, H)
        if self.temperature is not None:
            q_THd = (q_THd * self.temperature.at(batch.position_T)[:, None, None]).to(q_THd.dtype)
        y_THd = attend(q_THd, cache, batch, self.sight)
        return linear(y_THd.reshape(T, H * self.head_dim), self.out, self.out_bias)


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """The even rows of each head, then the odd ones: `rotate` turns against each other what stood side by side."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


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


def attend(q_THd: Tensor, cache: KvCache, batch: AttentionBatch, sight: Sight = PLAIN) -> Tensor:
    """[T, H, d]: each token attends to what it sees of its sequence, up to itself."""
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    B = batch.num_decode
    where = batch.decode_block_BN, batch.decode_length_B, batch.block_size
    if batch.planned is not None:
        batch.planned.attend(q_THd, cache, sight, out)
        return out
    if batch.backend == "triton":
        _attend_on_gpu(q_THd, cache, batch, sight, out)
        return out
    if B and cpu.handles(q_THd):
        from nonet.kernels.cpu import attention

        seen, sink_H, scale = (sight.window, sight.chunk), sight.sink_H, sight.scale
        attention.decode(q_THd[:B], cache, *where, out[:B], *seen, sink_H, scale)
    elif B:
        out[:B] = decode(q_THd[:B], cache, *where, sight)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        out[rows] = _attend_one(q_THd[rows], cache, part, sight)
    return out


def _attend_on_gpu(q_THd: Tensor, cache: KvCache, batch: AttentionBatch, sight: Sight, out: Tensor) -> None:
    """Nothing is read on the host, so all of it can be captured."""
    from nonet.kernels.triton import decode, prefill

    (keys, values), B, prompts, size = cache, batch.num_decode, batch.prompts, batch.block_size
    if B:
        where, seen = (batch.decode_block_BN, batch.decode_length_B, size), (sight.window, sight.chunk)
        decode.decode(q_THd[:B], cache, *where, out[:B], *seen, sight.sink_H, sight.scale)
    if prompts is not None:
        block_PN, everything = prompts.block_PN, sight.window is None and sight.chunk is None
        if everything and prefill.gathers(keys, size, q_THd.shape[1], len(prompts.place_C), prompts.pairs):
            keys, values = keys.index_select(0, prompts.place_C), values.index_select(0, prompts.place_C)
            block_PN, size = prompts.begin_P.unsqueeze(1), 0
        prefill.prefill(
            q_THd, keys, values, block_PN, prompts.first_P, prompts.count_P, prompts.context_P, size, out,
            window=sight.window, chunk=sight.chunk, sink_H=sight.sink_H, scale=sight.scale,
        )  # fmt: skip


def decode(
    q_BHd: Tensor, cache: KvCache, block_BN: Tensor, length_B: Tensor, block_size: int, sight: Sight = PLAIN
) -> Tensor:
    """[B, H, d]: each sequence's one token attends to its context."""
    B, H, d = q_BHd.shape
    h, C = cache[0].shape[1], block_BN.shape[1] * block_size
    place_BC = (block_BN.unsqueeze(2) * block_size + torch.arange(block_size, device=q_BHd.device)).view(B, C)
    k, v = (part.index_select(0, place_BC.view(-1)).view(B, C, h, d).transpose(1, 2) for part in cache)
    q = q_BHd.reshape(B, h, H // h, d)  # the heads of a group attend alike: they stand as its queries
    mask_BC = sight.mask(length_B.unsqueeze(1) - 1, torch.arange(C, device=q.device))
    k, v = (part.masked_fill(~mask_BC[:, None, :, None], 0) for part in (k, v))  # there NaN may stand
    mask = mask_BC[:, None, None, :]
    if sight.sink_H is not None:
        mask = mask.expand(B, h, H // h, C)
        k, v, mask = _with_sink(k, v, mask, sight.sink_H.view(1, h, H // h, 1).expand(B, -1, -1, -1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=sight.scale).reshape(B, H, d)


def _attend_one(q_THd: Tensor, cache: KvCache, part: Prefill, sight: Sight) -> Tensor:
    """A chunk of a prompt against the context that ends with it."""
    T, H, _ = q_THd.shape
    context = part.place_C.shape[0]
    seen = sight.first(context - T)  # no token of the chunk sees what lies before
    q = q_THd.transpose(0, 1).unsqueeze(0)
    k, v = (rows.index_select(0, part.place_C[seen:]).transpose(0, 1).unsqueeze(0) for rows in cache)
    gqa, scale = k.shape[1] != H, sight.scale
    if context == T and sight.window is None and sight.chunk is None and sight.sink_H is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)
    position = torch.arange(context, device=q.device)
    mask = sight.mask(position[context - T :].unsqueeze(1), position[seen:])
    if sight.sink_H is not None:
        mask = mask.expand(1, H, -1, -1)
        k, v, mask = _with_sink(k, v, mask, sight.sink_H.view(1, H, 1, 1).expand(-1, -1, T, -1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


def _with_sink(k: Tensor, v: Tensor, mask: Tensor, sink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One place more, of zeros, so that the product with it is its mask: the sink's logit. `mask` becomes an addend."""
    k, v = (F.pad(part, (0, 0, 0, 1)) for part in (k, v))
    addend = torch.zeros(mask.shape, dtype=k.dtype, device=k.device).masked_fill_(~mask, -torch.inf)
    return k, v, torch.cat([addend, sink.to(k.dtype)], dim=-1)
