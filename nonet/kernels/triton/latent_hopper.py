"""Latent decoding for Hopper's matrix units: the spans of `decode` for rows that are keys and values, in Gluon.

Used by `latent_decode` where there are more than 16 query heads, so that products count and not memory alone. A program
has 64 of them: the queries and two tiles fill shared memory, and sums of 512 columns the registers of two warpgroups.
As in FlashMLA (DeepSeek, 2025), one makes scores, their softmax and the sums' first half, the other brings tiles and
makes the second half, so that one's products run while the other does none.
What a program finds, and where it leaves it, is as in `decode`. Of shared memory, full: written; free: read.
Legend: that of `decode`; S slots for sequences, c tiles so far.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

WARPS = 4  # of the first warpgroup; the second is its worker
H = gl.constexpr(64)  # query heads of a program
N = gl.constexpr(64)  # places of a tile
LOWEST = gl.constexpr(-1e30)  # as in `decode`
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _span(length, B, programs, me, SLOTS: gl.constexpr):
    """(where the tiles of each sequence end, how many a program has, its first, the one after its last)."""
    slots = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [4], [0]))
    tiles_S = gl.maximum((gl.load(length + slots, mask=slots < B, other=0).to(gl.int32) + N - 1) // N, 1)
    end_S = gl.associative_scan(gl.where(slots < B, tiles_S, 0), 0, _add)
    total = gl.max(end_S, 0)
    span = gl.maximum((total + programs - 1) // programs, 1)
    return end_S, span, me * span, gl.minimum((me + 1) * span, total)


@gluon.jit
def _context(length, end_S, tile, stop):
    """(sequence, its length, its tiles, the first of them here, the one after the last here)."""
    b = gl.sum((end_S <= tile).to(gl.int32), 0)
    number = gl.load(length + b).to(gl.int32)
    start = tile - gl.max(gl.where(end_S <= tile, end_S, 0), 0)
    tiles = gl.maximum((number + N - 1) // N, 1)
    return b.to(gl.int64), number, tiles, start, gl.minimum(tiles, start + stop - tile)


@gluon.jit
def _place(blocks, position, number, SIZE: gl.constexpr):
    """Cache places of positions, 0 past the last."""
    block = gl.load(blocks + position // SIZE, mask=position < number, other=0).to(gl.int32)
    return block * SIZE + position % SIZE


@gluon.jit
def _copy(part_1, part_2, part_3, row, here, rows, width):
    """Starts to bring rows, in three parts; zeros where there is none: NaN may stand in the cache."""
    C: gl.constexpr = part_1.shape[1]
    column, rest = gl.arange(0, C, gl.SliceLayout(0, COPY)), gl.arange(0, part_3.shape[1], gl.SliceLayout(0, COPY))
    at, here = rows + row.to(gl.int64)[:, None] * width, here[:, None]
    async_copy.async_copy_global_to_shared(part_1, at + column[None, :], mask=here)
    async_copy.async_copy_global_to_shared(part_2, at + (column + C)[None, :], mask=here)
    async_copy.async_copy_global_to_shared(part_3, at + (rest + 2 * C)[None, :], mask=here)


@gluon.jit
def _arrived(pending: gl.constexpr):
    """Waits for all copies but the last so many groups; then the matrix units may read what came."""
    async_copy.wait_group(pending)
    hopper.fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _scores(query_1, query_2, query_3, keys_1, keys_2, keys_3, k_full, c, zeros):
    """Starts the products of queries and the keys of tile c, when these are there."""
    now = c & 1
    mbarrier.wait(k_full.index(now), (c >> 1) & 1)
    score = hopper.warpgroup_mma(query_1, keys_1.index(now).permute((1, 0)), zeros, use_acc=False, is_async=True)
    score = hopper.warpgroup_mma(query_2, keys_2.index(now).permute((1, 0)), score, is_async=True)
    return hopper.warpgroup_mma(query_3, keys_3.index(now).permute((1, 0)), score, is_async=True)


@gluon.jit
def _weigh(score, best, mass, here, scale, sums, weights, fades, value, p_full, p_free, c):
    """A tile's softmax, handed over, and its share of the sums' first half begun."""
    score = gl.where(here[None, :], score * scale, float("-inf"))
    higher = gl.maximum(best, gl.max(score, 1))
    weight = gl.exp2(score - higher[:, None])
    fade = gl.exp2(best - higher)
    mass = mass * fade + gl.sum(weight, 1)
    mbarrier.wait(p_free, (c + 1) & 1)
    weights.store(weight.to(weights.dtype))
    fades.store(fade)
    hopper.fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(p_full, count=1)
    sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
    return hopper.warpgroup_mma(weights, value, sums, is_async=True), higher, mass


@gluon.jit
def _put(sums, mass, whole, out, b, out_stride, out_head, part, first, g, column, G: gl.constexpr):
    """Half of each head's numbers: to its row or, where other programs have a part of the context, to what is left."""
    C: gl.constexpr = sums.shape[1]
    if whole:
        mean = sums / gl.where(mass > 0, mass, 1.0)[:, None]  # of an empty context, zeros
        to = out + b * out_stride + g[:, None] * out_head + column[None, :]
        gl.store(to, mean.to(out.dtype.element_ty), mask=(g < G)[:, None])
    else:
        left = part + (first + g)[:, None].to(gl.int64) * (2 * C) + column[None, :]
        gl.store(left, sums, mask=(g < G)[:, None])


@gluon.jit
def _first(
    q, out, part, top, cut, length, B, q_stride, q_head, out_stride, out_head, scale, programs, me, pack,
    query_1, query_2, query_3, keys_1, keys_2, keys_3, weights, fades, masses, k_full, k_free, p_full, p_free, m_full,
    G: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and the first half of the sums."""
    C: gl.constexpr = query_1.shape[1]
    n, g = gl.arange(0, N, gl.SliceLayout(0, SCORE)), pack * H + gl.arange(0, H, gl.SliceLayout(1, COPY))
    g_score = pack * H + gl.arange(0, H, gl.SliceLayout(1, SCORE))
    g_sums, column = pack * H + gl.arange(0, H, gl.SliceLayout(1, SUMS)), gl.arange(0, C, gl.SliceLayout(0, SUMS))
    zeros = gl.full([H, N], 0.0, gl.float32, SCORE)
    end_S, span, tile, stop = _span(length, B, programs, me, SLOTS)
    c, slot, which, last, place = 0, 0, -1, 0, 0
    while tile < stop:
        b, number, tiles, start, after = _context(length, end_S, tile, stop)
        _copy(query_1, query_2, query_3, g, g < G, q + b * q_stride, q_head)
        async_copy.commit_group()
        best = gl.full([H], LOWEST, gl.float32, gl.SliceLayout(1, SCORE))
        mass = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORE))
        sums = gl.full([H, C], 0.0, gl.float32, SUMS)
        _arrived(0)
        score = _scores(query_1, query_2, query_3, keys_1, keys_2, keys_3, k_full, c, zeros)
        for i in range(start, after - 1):
            score = hopper.warpgroup_mma_wait(0, deps=[score])
            here, value = i * N + n < number, keys_1.index(c & 1)
            sums, best, mass = _weigh(score, best, mass, here, scale, sums, weights, fades, value, p_full, p_free, c)
            score = _scores(query_1, query_2, query_3, keys_1, keys_2, keys_3, k_full, c + 1, zeros)
            sums = hopper.warpgroup_mma_wait(3, deps=[sums])  # all but the scores
            gl.thread_barrier()
            mbarrier.arrive(k_free.index(c & 1), count=1)
            c += 1
        score = hopper.warpgroup_mma_wait(0, deps=[score])
        here, value = (after - 1) * N + n < number, keys_1.index(c & 1)
        sums, best, mass = _weigh(score, best, mass, here, scale, sums, weights, fades, value, p_full, p_free, c)
        sums = hopper.warpgroup_mma_wait(0, deps=[sums])
        masses.store(mass)
        gl.thread_barrier()
        mbarrier.arrive(k_free.index(c & 1), count=1)
        mbarrier.arrive(m_full, count=1)
        c += 1
        whole, first = after - start == tiles, (me * 2 + slot) * ROWS
        full = gl.convert_layout(mass, gl.SliceLayout(1, SUMS))
        _put(sums, full, whole, out, b, out_stride, out_head, part, first, g_sums, column, G)
        if not whole:
            gl.store(top + first + g_score, best)
            gl.store(top + programs * 2 * ROWS + first + g_score, mass)
            if start == 0:
                which, last, place = b.to(gl.int32), (tile + tiles - 1) // span, slot
        tile += after - start
        slot = 1
    gl.store(cut + me * 3, which)
    gl.store(cut + me * 3 + 1, last)
    gl.store(cut + me * 3 + 2, place)


@gluon.jit
def _second(
    rows, block, out, part, length, B, block_stride, out_stride, out_head, programs, me, pack,
    keys_1, keys_2, keys_3, weights, fades, masses, k_full, k_free, p_full, p_free, m_full,
    G: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Brings tiles, and the second half of the sums."""
    C: gl.constexpr = keys_1.shape[2]
    W: gl.constexpr = 2 * C + keys_3.shape[2]
    n = gl.arange(0, N, gl.SliceLayout(1, COPY))
    g, column = pack * H + gl.arange(0, H, gl.SliceLayout(1, SUMS)), gl.arange(0, C, gl.SliceLayout(0, SUMS))
    end_S, span, tile, stop = _span(length, B, programs, me, SLOTS)
    c, slot, contexts = 0, 0, 0
    while tile < stop:
        b, number, tiles, start, after = _context(length, end_S, tile, stop)
        blocks = block + b * block_stride
        for j in gl.static_range(2):  # the first two tiles
            end, at, now = gl.where(start + j < after, number, 0), (start + j) * N + n, (c + j) & 1
            place = _place(blocks, at, end, SIZE)
            _copy(keys_1.index(now), keys_2.index(now), keys_3.index(now), place, at < end, rows, W)
            async_copy.commit_group()
        sums = gl.full([H, C], 0.0, gl.float32, SUMS)
        _arrived(1)
        mbarrier.arrive(k_full.index(c & 1), count=1)
        for i in range(start, after):
            now, end, at = c & 1, gl.where(i + 2 < after, number, 0), (i + 2) * N + n
            place = _place(blocks, at, end, SIZE)
            mbarrier.wait(p_full, c & 1)
            fade = fades.load(gl.SliceLayout(1, SUMS))
            sums = hopper.warpgroup_mma(weights, keys_2.index(now), sums * fade[:, None], is_async=True)
            _arrived(0)
            mbarrier.arrive(k_full.index((c + 1) & 1), count=1, pred=i + 1 < after)
            sums = hopper.warpgroup_mma_wait(0, deps=[sums])
            gl.thread_barrier()
            mbarrier.arrive(p_free, count=1)
            mbarrier.wait(k_free.index(now), (c >> 1) & 1)
            _copy(keys_1.index(now), keys_2.index(now), keys_3.index(now), place, at < end, rows, W)
            async_copy.commit_group()
            c += 1
        async_copy.wait_group(0)
        mbarrier.wait(m_full, contexts & 1)
        mass, first = masses.load(gl.SliceLayout(1, SUMS)), (me * 2 + slot) * ROWS
        _put(sums, mass, after - start == tiles, out, b, out_stride, out_head, part, first, g, column + C, G)
        tile += after - start
        slot = 1
        contexts += 1


@gluon.jit(do_not_specialize=["B", "block_stride", "programs"])
def spans(
    q, rows, block, length, out, part, top, cut, B, block_stride, q_stride, q_head, out_stride, out_head, scale,
    programs, G: gl.constexpr, DIM: gl.constexpr, REST: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr,
    PACKS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = DIM // 2
    ROWS: gl.constexpr = PACKS * H
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kind: gl.constexpr = rows.dtype.element_ty
    me, pack = gl.program_id(0) // PACKS, gl.program_id(0) % PACKS
    query_1 = gl.allocate_shared_memory(kind, [H, C], shared)
    query_2 = gl.allocate_shared_memory(kind, [H, C], shared)
    query_3 = gl.allocate_shared_memory(kind, [H, REST], shared)
    keys_1 = gl.allocate_shared_memory(kind, [2, N, C], shared)
    keys_2 = gl.allocate_shared_memory(kind, [2, N, C], shared)
    keys_3 = gl.allocate_shared_memory(kind, [2, N, REST], shared)
    weights = gl.allocate_shared_memory(kind, [H, N], shared)
    fades = gl.allocate_shared_memory(gl.float32, [H], line)
    masses = gl.allocate_shared_memory(gl.float32, [H], line)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    p_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    p_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    m_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for j in gl.static_range(2):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(k_free.index(j), count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_free, count=1)
    mbarrier.init(m_full, count=1)
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_first, (
                q, out, part, top, cut, length, B, q_stride, q_head, out_stride, out_head, scale, programs, me, pack,
                query_1, query_2, query_3, keys_1, keys_2, keys_3, weights, fades, masses,
                k_full, k_free, p_full, p_free, m_full, G, SLOTS, ROWS,
            )),
            (_second, (
                rows, block, out, part, length, B, block_stride, out_stride, out_head, programs, me, pack,
                keys_1, keys_2, keys_3, weights, fades, masses, k_full, k_free, p_full, p_free, m_full,
                G, SIZE, SLOTS, ROWS,
            )),
        ],
        [4], [240],  # warps and registers a thread of the worker
    )  # fmt: skip
