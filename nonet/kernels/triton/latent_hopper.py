"""Latent decoding for Hopper's matrix units: the spans of `decode` for rows that are keys and values, in Gluon.

Used by `latent_decode` where there are more than 16 query heads, so that products count and not memory alone. A program
has 64 of them: the queries and two tiles fill shared memory, and sums of 512 columns the registers of two warpgroups,
each of which has half of the columns. As in FlashMLA (DeepSeek, 2025) they take turns: a tile's owner brings it, makes
its scores and weights and hands these over, then both add to their sums. So one's softmax runs while the other's
products do, and a tile is on its way while the one before it is worked on, also from one context to the next.
What a program finds, and where it leaves it, is as in `decode`.
Legend: that of `decode`; S slots for sequences; W the warpgroup, 0 or 1, owner of every other tile. Barriers, of each
tile in memory: full, its rows are there; handed, its weights are; freed, the other warpgroup is done with it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

WARPS = 4  # of the first warpgroup; the second is its worker
HEADS, HALF = 64, 256  # query heads of a program; columns that one box of a row has, and those of a warpgroup's sums
H = gl.constexpr(HEADS)
N = gl.constexpr(64)  # places of a tile, and columns of a row beyond its value: weights lie where those were
LOWEST = gl.constexpr(-1e30)  # as in `decode`
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _anew(number: gl.constexpr):
    """The number, unknown to the compiler: addresses made of it early, for all turns, would fill the registers."""
    at = gl.to_tensor(number)
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tiles(number):
    """Of a context of so many; an empty one has a tile, too."""
    return gl.maximum((number + N - 1) // N, 1)


@gluon.jit
def _span(length, B, programs, me, SLOTS: gl.constexpr):
    """(tiles of a program, its first, the one after its last; the first's sequence, its length, its first tile)."""
    slots = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [4], [0]))
    tiles_S = _tiles(gl.load(length + slots, mask=slots < B, other=0).to(gl.int32))
    end_S = gl.associative_scan(gl.where(slots < B, tiles_S, 0), 0, _add)
    total = gl.max(end_S, 0)
    span = gl.maximum((total + programs - 1) // programs, 1)
    begin, stop = me * span, gl.minimum((me + 1) * span, total)
    at = gl.minimum(begin, total - 1)
    b = gl.sum((end_S <= at).to(gl.int32), 0)
    base = gl.max(gl.where(end_S <= at, end_S, 0), 0)
    return span, begin, gl.maximum(stop, begin), b, gl.load(length + b).to(gl.int32), base


@gluon.jit
def _sequence(b, number, base, tile, length):
    """(sequence of a tile, its length, its first tile), from those of an earlier tile."""
    while tile >= base + _tiles(number):
        base += _tiles(number)
        b += 1
        number = gl.load(length + b).to(gl.int32)
    return b, number, base


@gluon.jit
def _row(blocks, position, number, SIZE: gl.constexpr):
    """Where the rows from a position on lie in the cache; past the last, anywhere."""
    found = gl.load(blocks + position // SIZE, mask=position < number, other=0)
    return found.to(gl.int32) * SIZE + position % SIZE


@gluon.jit
def _rows(b, position, number, block, block_stride, SIZE: gl.constexpr, BOX: gl.constexpr):
    """Where the boxes of a tile lie; what it does not have lies where its first does."""
    blocks = block + b.to(gl.int64) * block_stride
    row_0 = _row(blocks, position, number, SIZE)
    row_1, row_2, row_3 = row_0, row_0, row_0
    if BOX <= 32:
        row_1 = _row(blocks, position + BOX, number, SIZE)
    if BOX <= 16:
        row_2 = _row(blocks, position + 2 * BOX, number, SIZE)
        row_3 = _row(blocks, position + 3 * BOX, number, SIZE)
    return row_0, row_1, row_2, row_3


@gluon.jit
def _bring_box(halves, rests, row, first: gl.constexpr, part_1, part_2, part_3, full):
    BOX: gl.constexpr = rests.block_shape[0]
    C: gl.constexpr = halves.block_shape[1]
    tma.async_copy_global_to_shared(halves, [row, 0], full, part_1.slice(first, BOX, dim=0))
    tma.async_copy_global_to_shared(halves, [row, C], full, part_2.slice(first, BOX, dim=0))
    tma.async_copy_global_to_shared(rests, [row, 2 * C], full, part_3.slice(first, BOX, dim=0))


@gluon.jit
def _bring(halves, rests, row, part_1, part_2, part_3, full):
    """Starts to bring a tile of rows from up to four places; row: that of each box."""
    BOX: gl.constexpr = rests.block_shape[0]
    mbarrier.expect(full, N * (2 * part_1.shape[1] + part_3.shape[1]) * 2)  # bytes
    _bring_box(halves, rests, row[0], 0, part_1, part_2, part_3, full)
    if BOX <= 32:
        _bring_box(halves, rests, row[1], BOX, part_1, part_2, part_3, full)
    if BOX <= 16:
        _bring_box(halves, rests, row[2], 2 * BOX, part_1, part_2, part_3, full)
        _bring_box(halves, rests, row[3], 3 * BOX, part_1, part_2, part_3, full)


@gluon.jit
def _clear(part_1, part_2, left):
    """Zeros where rows are not of the context: NaN may stand in the cache."""
    here = gl.arange(0, N, gl.SliceLayout(1, COPY)) < left
    for i in gl.static_range(2 * part_1.shape[1] // N):
        part = part_1 if i * N < part_1.shape[1] else part_2
        columns = part.slice(i * N % part.shape[1], N, dim=1)
        columns.store(gl.where(here[:, None], columns.load(COPY), 0.0))
    hopper.fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _score(query_1, query_2, query_3, key_1, key_2, key_3):
    """Products of queries and keys, begun."""
    score = gl.full([H, N], 0.0, gl.float32, SCORE)
    score = hopper.warpgroup_mma(query_1, key_1.permute((1, 0)), score, use_acc=False, is_async=True)
    score = hopper.warpgroup_mma(query_2, key_2.permute((1, 0)), score, is_async=True)
    return hopper.warpgroup_mma(query_3, key_3.permute((1, 0)), score, is_async=True)


@gluon.jit
def _weigh(score, left, scale, best, mass, weights, bests, masses, handed):
    """A tile's weights, handed over; (the highest product so far, the sum of weights, what sums so far shrink by)."""
    here = gl.arange(0, N, gl.SliceLayout(0, SCORE)) < left
    score = gl.where(here[None, :], score * scale, float("-inf"))
    higher = gl.maximum(best, gl.max(score, 1))
    weight = gl.exp2(score - higher[:, None])
    fade = gl.exp2(best - higher)
    mass = mass * fade + gl.sum(weight, 1)
    weights.store(weight.to(weights.dtype))
    bests.store(higher)
    masses.store(mass)
    hopper.fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(handed, count=1)
    return higher, mass, fade


@gluon.jit
def _add_share(sums, fade, weights, value):
    """What a tile adds to this half of the sums."""
    sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
    sums = hopper.warpgroup_mma(weights, value, sums, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[sums])


@gluon.jit
def _put(sums, mass, whole, out, part, out_head, g, column, G: gl.constexpr):
    """Half of each head's numbers: to its row or, where other programs have a part of the context, to what is left."""
    C: gl.constexpr = sums.shape[1]
    if whole:
        mean = sums / gl.where(mass > 0, mass, 1.0)[:, None]  # of an empty context, zeros
        to = out + g[:, None] * out_head + column[None, :]
        gl.store(to, mean.to(out.dtype.element_ty), mask=(g < G)[:, None])
    else:
        gl.store(part + g[:, None].to(gl.int64) * (2 * C) + column[None, :], sums, mask=(g < G)[:, None])


@gluon.jit
def _note(whole, top, cut, at, all_rows, me, span, b, begin, base, end, slot, best, mass, pack):
    """Of a context that is not whole, what goes with the sums; and, where it begins, what it is and how far it goes."""
    if not whole:
        g = at + pack * H + gl.arange(0, H, gl.SliceLayout(1, SCORE))
        gl.store(top + g, best)
        gl.store(top + all_rows + g, mass)
        if base >= begin:
            gl.store(cut + me * 3, b)
            gl.store(cut + me * 3 + 1, (end - 1) // span)
            gl.store(cut + me * 3 + 2, slot)


@gluon.jit
def _finish(
    tile, begin, stop, span, me, pack, programs, length, out, out_stride, out_head, part, top, cut,
    b, number, base, slot, best, mass, sums, W: gl.constexpr, G: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Puts the sums where they belong if this tile was the last of a context here; what comes next is another."""
    C: gl.constexpr = sums.shape[1]
    end = base + _tiles(number)
    if (tile + 1 == end) | (tile + 1 == stop):
        g, column = pack * H + gl.arange(0, H, gl.SliceLayout(1, SUMS)), gl.arange(0, C, gl.SliceLayout(0, SUMS))
        whole, at = (base >= begin) & (end <= stop), (me * 2 + slot) * ROWS
        to, to_part = out + b.to(gl.int64) * out_stride, part + at.to(gl.int64) * (2 * C)
        full_mass = gl.convert_layout(mass, gl.SliceLayout(1, SUMS))
        _put(sums, full_mass, whole, to, to_part, out_head, g, column + W * C, G)
        if W == 0:
            _note(whole, top, cut, at, programs * 2 * ROWS, me, span, b, begin, base, end, slot, best, mass, pack)
        slot = 1
        if tile + 1 < stop:
            b, number, base = _sequence(b, number, base, tile + 1, length)
        best = gl.full([H], LOWEST, gl.float32, gl.SliceLayout(1, SCORE))
        mass = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORE))
        sums = gl.full([H, C], 0.0, gl.float32, SUMS)
    return b, number, base, slot, best, mass, sums


@gluon.jit
def _half(
    queries, query_rests, rows, rests, block, length, out, part, top, cut, B, block_stride, heads, out_stride, out_head,
    scale, programs, me, pack, queries_1, queries_2, queries_3, keys_1, keys_2, keys_3, bests, masses, full, asked,
    handed, freed, W: gl.constexpr, G: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """A warpgroup's part of a program."""
    C: gl.constexpr = keys_1.shape[2]
    BOX: gl.constexpr = rests.block_shape[0]
    values = keys_1 if W == 0 else keys_2
    span, begin, stop, b, number, base = _span(length, B, programs, me, SLOTS)
    if W == 0:
        gl.store(cut + me * 3, -1)
    next_b, next_number, next_base = b, number, base  # those of its own tile to come
    if begin + W < stop:
        next_b, next_number, next_base = _sequence(b, number, base, begin + W, length)
        row = _rows(next_b, (begin + W - next_base) * N, next_number, block, block_stride, SIZE, BOX)
        _bring(rows, rests, row, keys_1.index(W), keys_2.index(W), keys_3.index(W), full.index(W))
    best = gl.full([H], LOWEST, gl.float32, gl.SliceLayout(1, SCORE))
    mass = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORE))
    sums = gl.full([H, C], 0.0, gl.float32, SUMS)
    slot, contexts = 0, 0
    for pair in range(0, (stop - begin + 1) // 2):
        for turn in gl.static_range(2):
            tile, zero, owner = begin + 2 * pair + turn, _anew(0), _anew(turn)
            key_1, key_2, key_3 = keys_1.index(owner), keys_2.index(owner), keys_3.index(owner)
            value, best_there, mass_there = values.index(owner), bests.index(owner), masses.index(owner)
            if tile < stop:
                if turn == W:
                    query_1, query_2, query_3 = queries_1.index(zero), queries_2.index(zero), queries_3.index(zero)
                    if (tile == base) | (tile == begin):  # no one multiplies by other queries any more
                        head = b * heads + pack * H
                        _bring(queries, query_rests, (head, 0, 0, 0), query_1, query_2, query_3, asked.index(W))
                        mbarrier.wait(asked.index(W), contexts & 1)
                        contexts += 1
                    mbarrier.wait(full.index(owner), pair & 1)
                    left = number - (tile - base) * N
                    if left < N:
                        _clear(key_1, key_2, left)
                    score = _score(query_1, query_2, query_3, key_1, key_2, key_3)
                    to_come = gl.minimum(tile + 2, stop - 1)
                    next_b, next_number, next_base = _sequence(next_b, next_number, next_base, to_come, length)
                    row = _rows(next_b, (to_come - next_base) * N, next_number, block, block_stride, SIZE, BOX)
                    score = hopper.warpgroup_mma_wait(0, deps=[score])
                    best, mass, fade = _weigh(
                        score, left, scale, best, mass, key_3, best_there, mass_there, handed.index(owner)
                    )
                    sums = _add_share(sums, fade, key_3, value)
                    mbarrier.wait(freed.index(owner), pair & 1)
                    if tile + 2 < stop:
                        _bring(rows, rests, row, key_1, key_2, key_3, full.index(owner))
                else:
                    mbarrier.wait(handed.index(owner), pair & 1)
                    higher = best_there.load(gl.SliceLayout(1, SCORE))
                    mass = mass_there.load(gl.SliceLayout(1, SCORE))
                    sums = _add_share(sums, gl.exp2(best - higher), key_3, value)
                    best = higher
                    gl.thread_barrier()
                    mbarrier.arrive(freed.index(owner), count=1)
                b, number, base, slot, best, mass, sums = _finish(
                    tile, begin, stop, span, me, pack, programs, length, out, out_stride, out_head, part, top, cut,
                    b, number, base, slot, best, mass, sums, W, G, ROWS,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["B", "block_stride", "programs"])
def spans(
    queries, query_rests, rows, rests, block, length, out, part, top, cut, B, block_stride, heads, out_stride, out_head,
    scale, programs, G: gl.constexpr, SIZE: gl.constexpr, SLOTS: gl.constexpr, PACKS: gl.constexpr,
):  # fmt: skip
    """queries [B * heads, 2 C + N] and the cache's rows, as boxes of C columns and, for the last, of N."""
    C: gl.constexpr = rows.block_shape[1]
    ROWS: gl.constexpr = PACKS * H
    kind: gl.constexpr = rows.dtype
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    me, pack = gl.program_id(0) // PACKS, gl.program_id(0) % PACKS
    queries_1 = gl.allocate_shared_memory(kind, [1, H, C], SHARED)
    queries_2 = gl.allocate_shared_memory(kind, [1, H, C], SHARED)
    queries_3 = gl.allocate_shared_memory(kind, [1, H, N], SHARED)
    keys_1 = gl.allocate_shared_memory(kind, [2, N, C], SHARED)
    keys_2 = gl.allocate_shared_memory(kind, [2, N, C], SHARED)
    keys_3 = gl.allocate_shared_memory(kind, [2, N, N], SHARED)
    bests = gl.allocate_shared_memory(gl.float32, [2, H], line)
    masses = gl.allocate_shared_memory(gl.float32, [2, H], line)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    asked = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    freed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for j in gl.static_range(2):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(asked.index(j), count=1)
        mbarrier.init(handed.index(j), count=1)
        mbarrier.init(freed.index(j), count=1)
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_half, (
                queries, query_rests, rows, rests, block, length, out, part, top, cut, B, block_stride, heads,
                out_stride, out_head, scale, programs, me, pack, queries_1, queries_2, queries_3, keys_1, keys_2,
                keys_3, bests, masses, full, asked, handed, freed, gl.constexpr(0), G, SIZE, SLOTS, ROWS,
            )),
            (_half, (
                queries, query_rests, rows, rests, block, length, out, part, top, cut, B, block_stride, heads,
                out_stride, out_head, scale, programs, me, pack, queries_1, queries_2, queries_3, keys_1, keys_2,
                keys_3, bests, masses, full, asked, handed, freed, gl.constexpr(1), G, SIZE, SLOTS, ROWS,
            )),
        ],
        [4], [240],  # warps and registers a thread of the worker
    )  # fmt: skip
