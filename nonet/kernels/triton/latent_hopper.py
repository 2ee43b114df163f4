"""Latent decoding for Hopper's matrix units: the spans of `decode` for rows that are keys and values, in Gluon.

Used by `latent_decode` where there are more than 16 query heads, so that products count and not memory alone. A program
has 64 of them; the 64 queries and two tiles of 64 rows fill shared memory, and the sums of 512 columns the registers of
two warpgroups, which divide the work as FlashMLA's do (DeepSeek, 2025): one makes scores, their softmax and the sums'
first half, the other brings tiles and makes the second half, so that one's products run while the other does none.
What a program finds, and where it leaves it, is as in `decode`. Shared words: full = written, free = read.
Legend: that of `decode`; S slots for sequences, H query heads of a program, C half of a row's value, c tiles so far.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

HEADS, WARPS = 64, 4  # of a program, and half of its warps: the second warpgroup is a worker of the first
LOWEST = gl.constexpr(-1e30)  # as in `decode`


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _place(blocks, position, number, SIZE: gl.constexpr):
    """Cache places of positions, 0 past the last."""
    block = gl.load(blocks + position // SIZE, mask=position < number, other=0).to(gl.int32)
    return block * SIZE + position % SIZE


@gluon.jit
def _copy(tile, place, here, columns, rows, width):
    """Starts to bring these columns of the rows at `place`; zeros where there is none: NaN may stand in the cache."""
    at = rows + place.to(gl.int64)[:, None] * width + columns[None, :]
    async_copy.async_copy_global_to_shared(tile, at, mask=here[:, None])


@gluon.jit
def _span(length, B, programs, me, SLOTS: gl.constexpr):
    """(where the tiles of each sequence end, how many a program has, its first, the one after its last)."""
    slots = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [4], [0]))
    tiles_S = gl.maximum((gl.load(length + slots, mask=slots < B, other=0).to(gl.int32) + 63) // 64, 1)
    end_S = gl.associative_scan(gl.where(slots < B, tiles_S, 0), 0, _add)
    total = gl.max(end_S, 0)
    span = gl.maximum((total + programs - 1) // programs, 1)
    return end_S, span, me * span, gl.minimum((me + 1) * span, total)


@gluon.jit
def _context(length, end_S, tile, stop):
    """(sequence, its length, its tiles, first of them here, the one after the last here)."""
    b = gl.sum((end_S <= tile).to(gl.int32), 0)
    number = gl.load(length + b).to(gl.int32)
    start = tile - gl.max(gl.where(end_S <= tile, end_S, 0), 0)
    tiles = gl.maximum((number + 63) // 64, 1)
    return b.to(gl.int64), number, tiles, start, gl.minimum(tiles, start + stop - tile)


@gluon.jit
def _or_one(mass):
    return gl.where(mass > 0, mass, 1.0)  # of an empty context


@gluon.jit
def _softmax(score, best, mass, here, scale):
    """(weights, the highest so far, the sum of weights, what sums so far are to be multiplied by)."""
    score = gl.where(here[None, :], score * scale, float("-inf"))
    higher = gl.maximum(best, gl.max(score, 1))
    weight = gl.exp2(score - higher[:, None])
    fade = gl.exp2(best - higher)
    return weight, higher, mass * fade + gl.sum(weight, 1), fade


@gluon.jit
def _scores(query_1, query_2, query_3, key_1, key_2, key_3, zeros):
    """Starts the products of queries and keys."""
    score = hopper.warpgroup_mma(query_1, key_1.permute((1, 0)), zeros, use_acc=False, is_async=True)
    score = hopper.warpgroup_mma(query_2, key_2.permute((1, 0)), score, is_async=True)
    return hopper.warpgroup_mma(query_3, key_3.permute((1, 0)), score, is_async=True)


@gluon.jit
def _weigh(score, best, mass, here, scale, sums, weights, fades, value, p_full, p_free, c):
    """Softmax of a tile, handed over, and the sums' first half begun."""
    weight, best, mass, fade = _softmax(score, best, mass, here, scale)
    mbarrier.wait(p_free, (c + 1) & 1)
    weights.store(weight.to(weights.dtype))
    fades.store(fade)
    hopper.fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(p_full, count=1)
    sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, sums.type.layout))[:, None]
    return hopper.warpgroup_mma(weights, value, sums, is_async=True), best, mass


@gluon.jit
def _first(
    q, out, part, top, cut, length, B, q_stride, q_head, out_stride, out_head, scale, programs, me, pack,
    query_1, query_2, query_3, keys_1, keys_2, keys_3, weights, fades, masses,
    k_full, k_free, p_full, p_free, m_full,
    G: gl.constexpr, SLOTS: gl.constexpr, PACKS: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and the first half of the sums."""
    H: gl.constexpr = 64
    N: gl.constexpr = 64
    C: gl.constexpr = query_1.shape[1]
    REST: gl.constexpr = query_3.shape[1]
    ROWS: gl.constexpr = PACKS * H
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    column, rest = gl.arange(0, C, gl.SliceLayout(0, wide)), gl.arange(0, REST, gl.SliceLayout(0, wide))
    n_score = gl.arange(0, N, gl.SliceLayout(0, of_score))
    g = pack * H + gl.arange(0, H, gl.SliceLayout(1, wide))
    g_score = pack * H + gl.arange(0, H, gl.SliceLayout(1, of_score))
    g_sums = pack * H + gl.arange(0, H, gl.SliceLayout(1, of_sums))
    to_column = gl.arange(0, C, gl.SliceLayout(0, of_sums))
    zeros = gl.full([H, N], 0.0, gl.float32, of_score)
    end_S, span, tile, stop = _span(length, B, programs, me, SLOTS)
    c, slot, which, last, place = 0, 0, -1, 0, 0
    while tile < stop:
        b, number, tiles, start, after = _context(length, end_S, tile, stop)
        q_rows = q + b * q_stride
        _copy(query_1, g, g < G, column, q_rows, q_head)
        _copy(query_2, g, g < G, column + C, q_rows, q_head)
        _copy(query_3, g, g < G, rest + 2 * C, q_rows, q_head)
        async_copy.commit_group()
        best = gl.full([H], LOWEST, gl.float32, gl.SliceLayout(1, of_score))
        mass = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, of_score))
        sums = gl.full([H, C], 0.0, gl.float32, of_sums)
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        gl.thread_barrier()
        now = c & 1
        mbarrier.wait(k_full.index(now), (c >> 1) & 1)
        score = _scores(query_1, query_2, query_3, keys_1.index(now), keys_2.index(now), keys_3.index(now), zeros)
        for i in range(start, after - 1):
            now, then = c & 1, (c + 1) & 1
            score = hopper.warpgroup_mma_wait(0, deps=[score])
            here = i * N + n_score < number
            sums, best, mass = _weigh(
                score, best, mass, here, scale, sums, weights, fades, keys_1.index(now), p_full, p_free, c
            )
            mbarrier.wait(k_full.index(then), ((c + 1) >> 1) & 1)
            score = _scores(
                query_1, query_2, query_3, keys_1.index(then), keys_2.index(then), keys_3.index(then), zeros
            )
            sums = hopper.warpgroup_mma_wait(3, deps=[sums])
            gl.thread_barrier()
            mbarrier.arrive(k_free.index(now), count=1)
            c += 1
        now = c & 1
        score = hopper.warpgroup_mma_wait(0, deps=[score])
        here = (after - 1) * N + n_score < number
        sums, best, mass = _weigh(
            score, best, mass, here, scale, sums, weights, fades, keys_1.index(now), p_full, p_free, c
        )
        sums = hopper.warpgroup_mma_wait(0, deps=[sums])
        masses.store(mass)
        gl.thread_barrier()
        mbarrier.arrive(k_free.index(now), count=1)
        mbarrier.arrive(m_full, count=1)
        c += 1
        if after - start == tiles:
            full = _or_one(gl.convert_layout(mass, gl.SliceLayout(1, of_sums)))[:, None]
            to = out + b * out_stride + g_sums[:, None] * out_head + to_column[None, :]
            gl.store(to, (sums / full).to(out.dtype.element_ty), mask=(g_sums < G)[:, None])
        else:
            first = (me * 2 + slot) * ROWS
            to_part = part + (first + g_sums)[:, None].to(gl.int64) * (2 * C) + to_column[None, :]
            gl.store(to_part, sums, mask=(g_sums < G)[:, None])
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
    G: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr, PACKS: gl.constexpr,
):  # fmt: skip
    """Brings tiles, and the second half of the sums."""
    H: gl.constexpr = 64
    N: gl.constexpr = 64
    C: gl.constexpr = keys_1.shape[2]
    REST: gl.constexpr = keys_3.shape[2]
    W: gl.constexpr = 2 * C + REST
    ROWS: gl.constexpr = PACKS * H
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # of a copy: 16 bytes a thread
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    column, rest = gl.arange(0, C, gl.SliceLayout(0, wide)), gl.arange(0, REST, gl.SliceLayout(0, wide))
    n = gl.arange(0, N, gl.SliceLayout(1, wide))
    g_sums = pack * H + gl.arange(0, H, gl.SliceLayout(1, of_sums))
    to_column = gl.arange(0, C, gl.SliceLayout(0, of_sums))
    end_S, span, tile, stop = _span(length, B, programs, me, SLOTS)
    c, slot, contexts = 0, 0, 0
    while tile < stop:
        b, number, tiles, start, after = _context(length, end_S, tile, stop)
        blocks = block + b * block_stride
        for j in gl.static_range(2):  # the first two tiles
            end = gl.where(start + j < after, number, 0)
            at = (start + j) * N + n
            place = _place(blocks, at, end, SIZE)
            into = (c + j) & 1
            _copy(keys_1.index(into), place, at < end, column, rows, W)
            _copy(keys_2.index(into), place, at < end, column + C, rows, W)
            _copy(keys_3.index(into), place, at < end, rest + 2 * C, rows, W)
            async_copy.commit_group()
        sums = gl.full([H, C], 0.0, gl.float32, of_sums)
        async_copy.wait_group(1)
        hopper.fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(k_full.index(c & 1), count=1)
        for i in range(start, after):
            now, then = c & 1, (c + 1) & 1
            end = gl.where(i + 2 < after, number, 0)
            at = (i + 2) * N + n
            place = _place(blocks, at, end, SIZE)
            mbarrier.wait(p_full, c & 1)
            fade = fades.load(gl.SliceLayout(1, of_sums))
            sums = hopper.warpgroup_mma(weights, keys_2.index(now), sums * fade[:, None], is_async=True)
            async_copy.wait_group(0)
            hopper.fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(k_full.index(then), count=1, pred=i + 1 < after)
            sums = hopper.warpgroup_mma_wait(0, deps=[sums])
            gl.thread_barrier()
            mbarrier.arrive(p_free, count=1)
            mbarrier.wait(k_free.index(now), (c >> 1) & 1)
            _copy(keys_1.index(now), place, at < end, column, rows, W)
            _copy(keys_2.index(now), place, at < end, column + C, rows, W)
            _copy(keys_3.index(now), place, at < end, rest + 2 * C, rows, W)
            async_copy.commit_group()
            c += 1
        async_copy.wait_group(0)
        mbarrier.wait(m_full, contexts & 1)
        mass = masses.load(gl.SliceLayout(1, of_sums))
        if after - start == tiles:
            to = out + b * out_stride + g_sums[:, None] * out_head + C + to_column[None, :]
            gl.store(to, (sums / _or_one(mass)[:, None]).to(out.dtype.element_ty), mask=(g_sums < G)[:, None])
        else:
            first = (me * 2 + slot) * ROWS
            to_part = part + (first + g_sums)[:, None].to(gl.int64) * (2 * C) + C + to_column[None, :]
            gl.store(to_part, sums, mask=(g_sums < G)[:, None])
        tile += after - start
        slot = 1
        contexts += 1


@gluon.jit(do_not_specialize=["B", "block_stride", "programs"])
def spans(
    q, rows, block, length, out, part, top, cut, B, block_stride, q_stride, q_head, out_stride, out_head, scale, programs,
    G: gl.constexpr, DIM: gl.constexpr, REST: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr,
    PACKS: gl.constexpr,
):  # fmt: skip
    H: gl.constexpr = 64
    N: gl.constexpr = 64
    C: gl.constexpr = DIM // 2
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
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
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    m_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
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
                k_full, k_free, p_full, p_free, m_full, G, SLOTS, PACKS,
            )),
            (_second, (
                rows, block, out, part, length, B, block_stride, out_stride, out_head, programs, me, pack,
                keys_1, keys_2, keys_3, weights, fades, masses, k_full, k_free, p_full, p_free, m_full,
                G, SIZE, SLOTS, PACKS,
            )),
        ],
        [4], [240],
    )  # fmt: skip
