"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over a paged cache of latents.

The cache holds one row a token: the latent that keys and values of all heads come from, and a rotated part that all
heads share. Heads are split over the tensor-parallel ranks, the row is the same on each. There are two forms of the
same sum. Plain: keys and values are made of the cached rows. Absorbed: the query goes through the keys' matrix instead
and the result through the values', so that in between all heads attend to the rows as they lie (one KV head).
On GPUs Triton kernels attend, in either form; the plain one then takes as many prompts at a time as memory allows.
Legend: T tokens, B decoding sequences, P prompts, D hidden, H heads of this rank, n unrotated and r rotated part of a
head's query and key, v width of its value, c width of the latent, W = c + r a cached row, C context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.kernels import triton as gpu
from nonet.kernels.linear import linear, pack
from nonet.layers.attention import AttentionBatch, KvCache, Prefill, Prompts, Sight, attend, halves
from nonet.layers.norm import rms_norm
from nonet.layers.rope import rotate
from nonet.weights.loader import Checkpoint

NORM_EPS = 1e-6  # of the norms in here, whatever the model's others have
MOST_MADE = 1 << 27  # numbers of keys and values that the plain form makes at a time, or those of one head


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Widths as config.json names them, and what products are scaled by before the softmax."""

    hidden: int
    q_lora_rank: int | None  # None: queries are made of the hidden row at once
    kv_lora_rank: int  # c
    nope: int  # n
    rope: int  # r
    value: int  # v
    scale: float
    interleaved: bool  # the checkpoint's rope turns neighbouring numbers; here it turns halves


class LatentAttention:
    """`forward` returns this rank's part of the sum over heads: [T, D], to be reduced over the tensor-parallel ranks.

    heads: first and last + 1 of this rank.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, *, heads: tuple[int, int], shape: LatentShape) -> None:
        self.shape, self.num_heads = shape, heads[1] - heads[0]
        c, n, r, v = shape.kv_lora_rank, shape.nope, shape.rope, shape.value
        q_rows = heads[0] * (n + r), heads[1] * (n + r)
        self.q_norm = self.q_up = None
        if shape.q_lora_rank is None:
            q = self._halves_of_heads(checkpoint.read(f"{prefix}.q_proj.weight", rows=q_rows))
        else:
            q = checkpoint.expect(f"{prefix}.q_a_proj.weight", (shape.q_lora_rank, shape.hidden))
            self.q_norm = checkpoint.expect(f"{prefix}.q_a_layernorm.weight", (shape.q_lora_rank,))
            self.q_up = pack(self._halves_of_heads(checkpoint.read(f"{prefix}.q_b_proj.weight", rows=q_rows)))
        down = checkpoint.expect(f"{prefix}.kv_a_proj_with_mqa.weight", (c + r, shape.hidden))
        self.down = pack(torch.cat([q, self._halves(down)]))  # both products of the hidden row in one
        self.down_bias = self._bias(checkpoint, prefix, len(q))
        self.kv_norm = checkpoint.expect(f"{prefix}.kv_a_layernorm.weight", (c,))
        up = checkpoint.read(f"{prefix}.kv_b_proj.weight", rows=(heads[0] * (n + v), heads[1] * (n + v)))
        self.kv_up = up.view(self.num_heads, n + v, c)
        self.out = pack(checkpoint.read(f"{prefix}.o_proj.weight", columns=(heads[0] * v, heads[1] * v)))
        self.out_bias = None
        if heads[0] == 0 and f"{prefix}.o_proj.bias" in checkpoint:  # on one rank: the parts are summed
            self.out_bias = checkpoint.read(f"{prefix}.o_proj.bias")

    def _bias(self, checkpoint: Checkpoint, prefix: str, q_rows: int) -> Tensor | None:
        """Of the first product. Queries have one only where they have a latent of their own."""
        if f"{prefix}.kv_a_proj_with_mqa.bias" not in checkpoint:
            return None
        own = self._halves(checkpoint.read(f"{prefix}.kv_a_proj_with_mqa.bias"))
        q = checkpoint.read(f"{prefix}.q_a_proj.bias") if self.q_up is not None else own.new_zeros(q_rows)
        return torch.cat([q, own])

    def _halves(self, rows: Tensor) -> Tensor:
        """The last r rows reordered for `rotate`, if need be."""
        if not self.shape.interleaved:
            return rows
        r = self.shape.rope
        return torch.cat([rows[:-r], halves(rows[-r:], r)])

    def _halves_of_heads(self, rows: Tensor) -> Tensor:
        return torch.cat([self._halves(head) for head in rows.chunk(self.num_heads)])

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, batch: AttentionBatch) -> Tensor:
        q_THx = self._project(x_TD, cos_sin, cache, batch.place_T)
        y_THv = x_TD.new_empty((len(x_TD), self.num_heads, self.shape.value))
        if batch.num_decode:
            y_THv[: batch.num_decode] = self.absorbed(q_THx[: batch.num_decode], cache, replace(batch, prefills=()))
        if batch.backend == "triton":
            self._prompts_on_gpu(q_THx, cache, batch, y_THv)
            return linear(y_THv.flatten(1), self.out, self.out_bias)
        for part in batch.prefills:
            rows = slice(part.first, part.first + part.count)
            form = self.plain if self._plain_is_cheaper(part) else self.absorbed_chunk
            y_THv[rows] = form(q_THx[rows], cache, part)
        return linear(y_THv.flatten(1), self.out, self.out_bias)

    def _project(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache, place_T: Tensor) -> Tensor:
        """Queries [T, H, n + r]; rows [T, W] go to their places in the cache. Of both the last r numbers are turned."""
        c, r = self.shape.kv_lora_rank, self.shape.rope
        both = linear(x_TD, self.down, self.down_bias)
        q, row_TW = both.split((both.shape[1] - c - r, c + r), dim=1)
        if self.q_up is not None and self.q_norm is not None:
            q = linear(rms_norm(q.contiguous(), self.q_norm, NORM_EPS), self.q_up)
        q_THx = q.view(len(x_TD), self.num_heads, -1)
        if gpu.handles(q_THx):
            from nonet.kernels.triton import rope

            rope.place_latent(q_THx, row_TW, (self.kv_norm, NORM_EPS), cos_sin, cache[0], place_T)
            return q_THx
        latent_Tc, k_Tr = row_TW.split((c, r), dim=1)
        k_Tr = rotate(k_Tr.unsqueeze(1), *cos_sin).squeeze(1)
        row_TW = torch.cat([rms_norm(latent_Tc.contiguous(), self.kv_norm, NORM_EPS), k_Tr], dim=-1)
        cache[0].index_copy_(0, place_T, row_TW.unsqueeze(1))
        return torch.cat([q_THx[..., :-r], rotate(q_THx[..., -r:], *cos_sin)], dim=-1)

    # -- absorbed ----------------------------------------------------------------------------------------------------

    def absorbed(self, q_BHx: Tensor, cache: KvCache, batch: AttentionBatch) -> Tensor:
        """[B, H, v] for the decoding sequences of a batch that has only these: attention with one KV head, whose values
        are the rows too; of the result the rotated part is dropped."""
        if batch.backend == "triton":
            where = batch.decode_block_BN, batch.decode_length_B, batch.block_size
            return self._absorbed_on_gpu(q_BHx, cache, *where)
        y_BHW = attend(self._into_rows(q_BHx), (cache[0], cache[0]), batch, Sight(scale=self.shape.scale))
        return self._out_of_rows(y_BHW)

    def absorbed_chunk(self, q_THx: Tensor, cache: KvCache, part: Prefill) -> Tensor:
        """[T, H, v] for a chunk of a prompt."""
        row_CHW = cache[0].index_select(0, part.place_C).expand(-1, self.num_heads, -1)
        return self._out_of_rows(_attend_chunk(self._into_rows(q_THx), row_CHW, row_CHW, self.shape.scale))

    def _into_rows(self, q_THx: Tensor) -> Tensor:
        """[T, H, W]: queries as they meet cached rows."""
        n = self.shape.nope
        latent_HTc = torch.bmm(q_THx[..., :n].transpose(0, 1), self.kv_up[:, :n])
        return torch.cat([latent_HTc.transpose(0, 1), q_THx[..., n:]], dim=-1)

    def _out_of_rows(self, y_THW: Tensor) -> Tensor:
        """[T, H, v]. The weight stands on the left: in bfloat16, oneDNN would copy it first on the right."""
        latent_HcT = y_THW[..., : self.shape.kv_lora_rank].permute(1, 2, 0)
        return torch.bmm(self.kv_up[:, self.shape.nope :], latent_HcT).permute(2, 0, 1)

    # -- plain -------------------------------------------------------------------------------------------------------

    def plain(self, q_THx: Tensor, cache: KvCache, part: Prefill) -> Tensor:
        """[T, H, v] for a chunk of a prompt; of a long context, a few heads' keys and values are made at a time."""
        row_CW = cache[0].index_select(0, part.place_C).squeeze(1)
        width = self.shape.nope + self.shape.rope + self.shape.value
        step = max(1, MOST_MADE // (len(row_CW) * width))
        heads = zip(q_THx.split(step, dim=1), self.kv_up.split(step), strict=True)
        return torch.cat([self._plain_heads(q_THx, kv_up, row_CW) for q_THx, kv_up in heads], dim=1)

    def _plain_heads(self, q_THx: Tensor, kv_up_Hxc: Tensor, row_CW: Tensor) -> Tensor:
        shape, H = self.shape, len(kv_up_Hxc)
        latent_Cc, k_Cr = row_CW.split((shape.kv_lora_rank, shape.rope), dim=1)
        up_CHx = F.linear(latent_Cc, kv_up_Hxc.flatten(0, 1)).unflatten(1, (H, -1))
        k_CHn, v_CHv = up_CHx.split((shape.nope, shape.value), dim=2)
        k_CHx = torch.cat([k_CHn, k_Cr.unsqueeze(1).expand(-1, H, -1)], dim=-1)
        more = shape.value - shape.nope - shape.rope  # fused attention on CPUs wants one width: zeros fill the lesser
        q_THx, k_CHx, v_CHv = _padded(q_THx, more), _padded(k_CHx, more), _padded(v_CHv, -more)
        return _attend_chunk(q_THx, k_CHx, v_CHv, shape.scale)[..., : shape.value]

    # -- on GPUs -----------------------------------------------------------------------------------------------------

    def _absorbed_on_gpu(
        self, q_BHx: Tensor, cache: KvCache, block_BN: Tensor, length_B: Tensor, block_size: int
    ) -> Tensor:
        from nonet.kernels.triton import latent_decode

        c, scale = self.shape.kv_lora_rank, self.shape.scale
        where = block_BN, length_B, block_size
        return self._out_of_rows(latent_decode.decode(self._into_rows(q_BHx), cache[0], *where, c, scale))

    def _prompts_on_gpu(self, q_THx: Tensor, cache: KvCache, batch: AttentionBatch, y_THv: Tensor) -> None:
        """Into the rows of y that are prompts', each in its cheaper form; absorbed, every new token counts as a
        sequence that decodes."""
        parts, prompts = batch.prefills, batch.prompts
        if prompts is None:
            return
        for plain, own in self._runs(parts):
            last = parts[own.stop - 1]
            rows = slice(parts[own.start].first, last.first + last.count)
            if plain:
                self._plain_on_gpu(q_THx, cache, parts, prompts, own, y_THv)
                continue
            count = rows.stop - rows.start
            block_TN = prompts.block_PN[own].repeat_interleave(prompts.count_P[own], dim=0, output_size=count)
            length_T = batch.position_T[rows] + 1
            y_THv[rows] = self._absorbed_on_gpu(q_THx[rows], cache, block_TN, length_T, batch.block_size)

    def _runs(self, parts: Sequence[Prefill]) -> list[tuple[bool, slice]]:
        """Successive prompts that are attended to at once, and whether plain: then `MOST_MADE` bounds them."""
        runs: list[tuple[bool, slice]] = []
        made, width = 0, (self.shape.nope + self.shape.value) * self.num_heads
        for index, part in enumerate(parts):
            plain, size = self._plain_is_cheaper(part), len(part.place_C) * width
            begin = index
            if runs and runs[-1][0] == plain and (not plain or made + size <= MOST_MADE):
                begin = runs.pop()[1].start
            made = size if begin == index else made + size
            runs.append((plain, slice(begin, index + 1)))
        return runs

    def _plain_on_gpu(
        self, q_THx: Tensor, cache: KvCache, parts: Sequence[Prefill], prompts: Prompts, own: slice, y_THv: Tensor
    ) -> None:
        """The plain form of successive prompts at once; of one with a long context, some heads at a time."""
        from nonet.kernels.triton import prefill

        shape = self.shape
        before, width = sum(len(part.place_C) for part in parts[: own.start]), shape.nope + shape.value
        size = sum(len(part.place_C) for part in parts[own])
        row_CW = cache[0].index_select(0, prompts.place_C[before : before + size]).squeeze(1)  # contexts end to end
        latent_Cc, k_Cr = row_CW.split((shape.kv_lora_rank, shape.rope), dim=1)
        where = (prompts.begin_P[own] - before).unsqueeze(1), prompts.first_P[own], prompts.count_P[own]
        step = max(1, MOST_MADE // (size * width))
        for first in range(0, self.num_heads, step):
            heads = slice(first, first + step)
            up_CHx = F.linear(latent_Cc, self.kv_up[heads].flatten(0, 1)).unflatten(1, (-1, width))
            k_CHn, v_CHv = up_CHx.split((shape.nope, shape.value), dim=2)
            given = q_THx[:, heads], k_CHn, v_CHv, *where, prompts.context_P[own], 0, y_THv[:, heads]
            prefill.prefill(*given, shared_k=k_Cr, scale=shape.scale)

    def _plain_is_cheaper(self, part: Prefill) -> bool:
        """By multiplications a head: making keys and values costs by context, but then products are narrow."""
        shape, T, C = self.shape, part.count, part.place_C.shape[0]
        c, r, up = shape.kv_lora_rank, shape.rope, shape.kv_lora_rank * (shape.nope + shape.value)
        pairs = T * C - T * (T - 1) // 2
        return C * up + pairs * 2 * max(shape.nope + r, shape.value) < T * up + pairs * 2 * (c + r)


def _padded(x: Tensor, more: int) -> Tensor:
    return F.pad(x, (0, more)) if more > 0 else x


def _attend_chunk(q_THx: Tensor, k_CHx: Tensor, v_CHx: Tensor, scale: float) -> Tensor:
    """[T, H, x]: the last T of C positions, each to all up to itself."""
    T, C = len(q_THx), len(k_CHx)
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q_THx, k_CHx, v_CHx))
    if T == C:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = torch.ones((T, C), dtype=torch.bool, device=q.device).tril(C - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y[0].transpose(0, 1)
