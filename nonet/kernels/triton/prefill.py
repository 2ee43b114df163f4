"""Attention of the new tokens of several prompts over the paged cache, one launch for all (varlen, chunked).

After FlashAttention-2 (Dao, arXiv:2307.08691). A program takes some queries of one prompt with all heads of a KV head,
as the rows of one tile: few rows are idle in short prompts, and the causal edge is narrow in long ones. It finds its
prompt by counting tiles, so nothing is mapped before and nothing read on the host. Specified by `layers.attention`.
Legend: T tokens, H query heads, h KV heads, d width of queries and keys, v of values, P prompts, N blocks of the
longest context; G = H / h heads of a tile, BM rows (query, head) and BN keys of a tile, A and B the widths of the two
pieces that d is cut into, as tiles are powers of two wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nonet.kernels.triton import INTERPRETED

BOX = 64  # places that the copy engine must find side by side
FEWEST = 2048  # queries a key, of all heads that share it, for which copying it first pays on an H100
MOST_COPIED = 1 << 28  # numbers
FEW_ROWS = 1 << 15  # below, tiles of 128 rows leave multiprocessors idle
SMALL_WINDOW = 256
ALL = 1 << 30  # no context is longer
LOG2_E = 1.4426950408889634
SMALLEST = tl.constexpr(-1e38)  # a maximum of nothing; finite, so that a difference to itself is zero


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut up."""

    BM: int
    BN: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


def prefill(
    q_THd: Tensor,
    k: Tensor,
    v: Tensor,
    block_PN: Tensor,
    first_P: Tensor,
    count_P: Tensor,
    context_P: Tensor,
    block_size: int,
    out_THv: Tensor,
    *,
    shared_k: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sink_H: Tensor | None = None,
    scale: float | None = None,
    tile: Tile | None = None,
) -> None:
    """Rows `first_P[p] : first_P[p] + count_P[p]` of q and out are the last tokens of prompt p, whose context has
    `context_P[p]` places of k [places, h, d] and v [places, h, v]; those in `block_PN`, int64, of `block_size` each.

    block_size 0: the context lies in one piece from place block_PN[p, 0] on. shared_k [places, r]: the last r of the d
    numbers of each key, the same for all heads; k then has only those before. Numbers of a head lie side by side
    everywhere. first, count, context: int64 on the device. Other rows of out are left as they are. scale: positive.
    """
    (T, H, d), (_, h, a), P = q_THd.shape, k.shape, block_PN.shape[0]
    if not T or not P:
        return
    if shared_k is None:
        a = 1 << a.bit_length() - 1 if a >= 16 else a  # the largest power of two, and what is left
        more = k[..., a:]
        k = k[..., :a]
    else:
        more = shared_k.unsqueeze(1).expand(-1, h, -1)
    width = v.shape[2]
    parts = (k, more, v) if d > a else (k, k, v)
    boxes = block_size % BOX == 0 and d == a and all(_fits_boxes(part) for part in parts)
    if tile is None:
        seen = min(span for span in (window, chunk, ALL) if span is not None)
        tile = choose(d, width, q_THd.dtype, H // h, T * H, seen, boxes)
    boxes = boxes and block_size % tile.BN == 0
    queries = tile.BM // (H // h)
    if queries == 0:
        raise ValueError(f"{H // h} heads a KV head do not fit the {tile.BM} rows of a tile")
    blocks = min(T, T // queries + P)  # at most; a prompt's last one may be partly empty
    read = [_boxes(part, tile.BN) for part in parts] if boxes else parts
    _prefill[(blocks * h,)](
        q_THd, *read, out_THv, block_PN, first_P, count_P, context_P, sink_H,
        (d**-0.5 if scale is None else scale) * LOG2_E, P, h, block_PN.stride(0), *q_THd.stride()[:2],
        *(stride for part in parts for stride in part.stride()[:2]), *out_THv.stride()[:2],
        G=H // h, BM=tile.BM, BN=tile.BN, BLOCK=block_size, WINDOW=window or 0, CHUNK=chunk or 0, BOXES=boxes,
        HAS_SINK=sink_H is not None, A=a, B=d - a, V=width, PROMPTS=_counted(P), WIDE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def gathers(keys: Tensor, block_size: int, num_heads: int, places: int, pairs: int) -> bool:
    """Whether it pays to lay contexts of so many places end to end first: small blocks are out of the copy engine's
    reach. pairs: of a new token and a place that it sees."""
    _, h, d = keys.shape
    small = block_size % BOX != 0 and keys.element_size() == 2 and _fits_boxes(keys)
    return small and num_heads // h * pairs >= FEWEST * places and 2 * places * h * d <= MOST_COPIED


def choose(d: int, width: int, dtype: torch.dtype, group: int, rows: int, seen: int, boxes: bool) -> Tile:
    """The fastest of those tried on an H100 in bfloat16. rows: of queries, over all heads; seen: positions that a token
    sees at most."""
    if dtype.itemsize > 2:
        return Tile(max(32, triton.next_power_of_2(group)), 32 if max(d, width) <= 128 else 16, 4, 1)
    if max(d, width) > 128:
        return Tile(128, 64, 8, 3 if d <= 192 and width <= 128 else 2)
    if group <= 64 and seen <= SMALL_WINDOW:
        return Tile(64, 32, 4, 3)
    if group <= 64 and (boxes or rows < FEW_ROWS):
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3) if d <= 64 or group > 64 else Tile(128, 32, 8, 3, registers=128)


def _counted(P: int) -> int:
    """Prompts that programs count: few different numbers, since each is compiled for."""
    return 16 if P <= 16 else max(256, triton.next_power_of_2(P))


def _fits_boxes(x: Tensor) -> bool:
    """Whether the copy engine (TMA, from Hopper on) can fetch tiles of x [places, h, width] as boxes."""
    has_engine = INTERPRETED or (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9)
    size, width = x.element_size(), x.shape[2]
    even = all(stride * size % 16 == 0 for stride in x.stride()[:2]) and x.data_ptr() % 16 == 0
    return has_engine and even and width >= 16 and width & (width - 1) == 0


def _boxes(x: Tensor, BN: int) -> TensorDescriptor:
    """x [places, h, width] as rows of all heads, to be fetched BN places of one head at a time."""
    (places, h, width), (row, head, _) = x.shape, x.stride()
    return TensorDescriptor(x, [places, (h - 1) * head + width], [row, 1], [BN, width])


@triton.jit
def _find(count, P, queries, PROMPTS: tl.constexpr, rank):
    """(prompt, its tile) of the program that comes so far from the end; tiles of late queries come first, as they have
    the most to do. Past the last one the prompt is P."""
    p = tl.arange(0, PROMPTS)
    number = tl.load(count + p, mask=p < P, other=0).to(tl.int32)
    tiles = (number + queries - 1) // queries
    end = tl.cumsum(tiles, axis=0)
    at = tl.sum(tiles, axis=0) - 1 - rank
    prompt = tl.sum((end <= at).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(p == prompt, end - tiles, 0), axis=0)
    return tl.where(at < 0, P, prompt), at - begin


@triton.jit
def _seen_from(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a token sees."""
    begin = position * 0
    if WINDOW:
        begin = tl.maximum(begin, position - WINDOW + 1)
    if CHUNK:
        begin = tl.maximum(begin, position // CHUNK * CHUNK)
    return begin


@triton.jit
def _tile(base, offset_M, here_M, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows of `WIDTH` numbers, filled up with zeros to a power of two."""
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH) if WIDTH > 16 else 16
    c = tl.arange(0, PADDED)
    at = base + offset_M[:, None] + c[None, :]
    if MASKED and PADDED != WIDTH:
        x = tl.load(at, mask=here_M[:, None] & (c[None, :] < WIDTH), other=0.0)
    elif MASKED:
        x = tl.load(at, mask=here_M[:, None], other=0.0)
    elif PADDED != WIDTH:
        x = tl.load(at, mask=c[None, :] < WIDTH, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _places(block, piece, n, last, BN: tl.constexpr, BLOCK: tl.constexpr, BOXES: tl.constexpr):
    """Where positions n .. n + BN - 1 lie, or only the first of them, where they lie in a row and are fetched so.
    Those after the last are given the last one's block."""
    at = n if BOXES else n + tl.arange(0, BN)
    if BLOCK == 0:
        place = piece + at
    elif BLOCK % BN == 0:
        place = tl.load(block + tl.minimum(n, last) // BLOCK) * BLOCK + at % BLOCK
    else:
        place = tl.load(block + tl.minimum(at, last) // BLOCK) * BLOCK + at % BLOCK
    return place


@triton.jit
def _fetch(x, column, place, stride, here, WIDTH: tl.constexpr, MASKED: tl.constexpr, BOXES: tl.constexpr):
    """A tile of keys or values from a column on."""
    return x.load([place.to(tl.int32), column]) if BOXES else _tile(x + column, place * stride, here, WIDTH, MASKED)


@triton.jit
def _dot(x, y, total, WIDE: tl.constexpr):
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _walk(
    state, query, read, stride, column, block, piece, keys, begin, last, position, scale,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, BOXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Over keys from keys[0] up to keys[1]. Of those before `begin` and after `last` nothing is read that counts.

    state: sums of values, the maximum of each row, and its sum of weights. query, read, stride, column: of the first
    and second piece of the keys, and of the values.
    """
    total, top, weight = state
    place = _places(block, piece, keys[0], last, BN, BLOCK, BOXES)
    for n in range(keys[0], keys[1], BN):
        at = n + tl.arange(0, BN)
        here = (at >= begin) & (at <= last)
        key = _fetch(read[0], column[0], place, stride[0], here, A, MASKED, BOXES)
        score = _dot(query[0], key.T, tl.zeros([BM, BN], tl.float32), WIDE)
        if B:
            key = _fetch(read[1], column[1], place, stride[1], here, B, MASKED, BOXES)
            score = _dot(query[1], key.T, score, WIDE)
        if MASKED:
            seen = at[None, :] <= position[:, None]
            if WINDOW or CHUNK:
                seen = seen & (at[None, :] >= _seen_from(position, WINDOW, CHUNK)[:, None])
            score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1) * scale)
        share = tl.exp2(score * scale - new[:, None])
        shrink = tl.exp2(top - new)
        weight = weight * shrink + tl.sum(share, 1)
        value = _fetch(read[2], column[2], place, stride[2], here, V, MASKED, BOXES)
        if MASKED and BOXES:
            value = tl.where(here[:, None], value, 0.0)
        place = _places(block, piece, n + BN, last, BN, BLOCK, BOXES)  # of the next tile: known before its turn comes
        total = _dot(share.to(value.dtype), value, total * shrink[:, None], WIDE)
        top = new
    return total, top, weight


@triton.jit(do_not_specialize=["P", "block_row"], do_not_specialize_on_alignment=["block", "first", "count", "context"])
def _prefill(
    q, k, more, v, out, block, first, count, context, sink, scale, P, h, block_row,
    q_token, q_head, k_place, k_head, more_place, more_head, v_place, v_head, out_token, out_head,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SINK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr,
    BOXES: tl.constexpr, PROMPTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BM // G
    VP: tl.constexpr = triton.next_power_of_2(V) if V > 16 else 16
    kv_head = tl.program_id(0) % h
    prompt, tile = _find(count, P, QUERIES, PROMPTS, tl.program_id(0) // h)
    if prompt < P:
        number = tl.load(count + prompt).to(tl.int32)
        before = tl.load(context + prompt).to(tl.int32) - number
        m = tl.arange(0, BM)
        query = tile * QUERIES + m // G
        here = (m < QUERIES * G) & (query < number)
        query = tl.minimum(query, number - 1)
        position, head = before + query, kv_head * G + m % G
        token = tl.load(first + prompt) + query
        rows = token * q_token + head * q_head
        qa = _tile(q, rows, here, A, True)
        qb = _tile(q + A, rows, here, B, True) if B else qa
        if HAS_SINK:
            top = tl.load(sink + head).to(tl.float32) * 1.4426950408889634
            weight = tl.full([BM], 1.0, tl.float32)
        else:
            top, weight = tl.full([BM], SMALLEST, tl.float32), tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, VP], tl.float32)

        own, last = before + tile * QUERIES, before + tl.minimum(tile * QUERIES + QUERIES, number) - 1
        begin = _seen_from(own, WINDOW, CHUNK)
        middle = (_seen_from(last, WINDOW, CHUNK) + BN - 1) // BN * BN  # from here on all rows see all,
        edge = (own + 1) // BN * BN  # up to here
        block += prompt.to(tl.int64) * block_row
        piece = tl.load(block)
        read, stride = (k, more, v), (k_place, more_place, v_place)
        column = kv_head * k_head, kv_head * more_head, kv_head * v_head
        state = total, top, weight
        if WINDOW or CHUNK:
            keys = begin // BN * BN, tl.minimum(middle, last + 1)
            state = _walk(
                state, (qa, qb), read, stride, column, block, piece, keys, begin, last, position, scale,
                BM, BN, BLOCK, WINDOW, CHUNK, A, B, V, True, BOXES, WIDE,
            )  # fmt: skip
        state = _walk(
            state, (qa, qb), read, stride, column, block, piece, (middle, edge), begin, last, position, scale,
            BM, BN, BLOCK, WINDOW, CHUNK, A, B, V, False, BOXES, WIDE,
        )  # fmt: skip
        keys = tl.maximum(middle, edge), last + 1
        total, top, weight = _walk(
            state, (qa, qb), read, stride, column, block, piece, keys, begin, last, position, scale,
            BM, BN, BLOCK, WINDOW, CHUNK, A, B, V, True, BOXES, WIDE,
        )  # fmt: skip
        c = tl.arange(0, VP)
        to = out + (token * out_token + head * out_head)[:, None] + c[None, :]
        mask = here[:, None] & (c[None, :] < V)
        tl.store(to, (total / weight[:, None]).to(out.dtype.element_ty), mask=mask)
