"""Latent decoding for Hopper's matrix units: the spans of `decode` for rows that are keys and values, in Gluon.

Used by `latent_decode` where there are more than 16 query heads, so that products count and not memory alone. A program
has 64 of them: the queries and two tiles fill shared memory, and sums of 512 columns the registers of two warpgroups,
each of which has half of the columns. As in FlashMLA (DeepSeek, 2025) they take turns: a tile's owner brings it, makes
its scores and weights and hands these over, then both add to their sums. A tile is on its way while the one before it
is worked on, also from one context to the next; a context's queries are asked for once no one multiplies by others.
What a program finds, and where it leaves it, is as in `decode`, but for contexts that are left whole (`_span`).
Legend: that of `decode`; S slots for sequences; W the warpgroup, 0 or 1, owner of every other tile. Barriers, of each
tile in memory: full, its rows are there; handed, its weights are; freed, the other warpgroup is done with it. One more:
asked, a context's queries are there.
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
SLACK = gl.constexpr(10)  # tiles that a program may have beyond an equal span, if then all contexts stay whole
LOWEST = gl.constexpr(-1e30)  # as in `decode`
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
# as sums are written, each warp's by itself: 16 bytes a thread, 64 of a row side by side
LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [0, 128], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [HEADS, HALF],
    )
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


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
    """(tiles of a program, its first, the one after its last; the first's sequence, its length, its first tile).

    Spans are equal, and their ends cut contexts. But if no program gets more tiles by it than SLACK or a quarter of its
    span, each has those contexts whole whose middle lies in its span.
    """
    slots = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [4], [0]))
    here = slots < B
    tiles_S = gl.where(here, _tiles(gl.load(length + slots, mask=here, other=0).to(gl.int32)), 0)
    end_S = gl.associative_scan(tiles_S, 0, _add)
    total = gl.max(end_S, 0)
    span = gl.maximum((total + programs - 1) // programs, 1)
    begin, stop = gl.minimum(me * span, total), gl.minimum((me + 1) * span, total)
    at = gl.minimum(begin, total - 1)
    b = gl.sum((end_S <= at).to(gl.int32), 0)
    base = gl.max(gl.where(end_S <= at, end_S, 0), 0)
    if programs < B:
        begin_S = end_S - tiles_S
        before_S = _tiles(gl.load(length + slots - 1, mask=here & (slots > 0), other=0).to(gl.int32))
        owner_S = (begin_S + tiles_S // 2) // span
        owner_before_S = (begin_S - before_S + before_S // 2) // span
        start_S = gl.where((slots == 0) | (owner_S != owner_before_S), begin_S, 0)
        start_S = gl.associative_scan(start_S, 0, _larger)  # where the program of each begins
        if gl.max(gl.where(here, end_S - start_S, 0), 0) <= span + gl.minimum(span // 4, SLACK):
            mine = here & (owner_S == me)
            stop = gl.max(gl.where(mine, end_S, 0), 0)
            begin = gl.min(gl.where(mine, begin_S, stop), 0)
            b = gl.min(gl.where(mine, slots, B - 1), 0)
            base = begin
    return span, begin, stop, b, gl.load(length + b).to(gl.int32), base


@gluon.jit
def _sequence(b, number, base, tile, length):
    """(sequence of a tile, its length, its first tile), from those of an earlier tile."""
    while tile >= base + _tiles(number):
        base += _tiles(number)
        b += 1
        number = gl.load(length + b).to(gl.int32)
    return b, number, base


@gluon.jit
def _block(blocks, position, number, SIZE: gl.constexpr):
    """The block of a position; past the last, any."""
    return gl.load(blocks + position // SIZE, mask=position < number, other=0)


@gluon.jit
def _look_up(tile, b, number, base, length, block, block_stride, SIZE: gl.constexpr, BOX: gl.constexpr):
    """(sequence of a tile, its length, its first tile; where in it the tile is, blocks of the tile's boxes), from those
    of an earlier tile. Nothing is computed of the blocks before they are needed, so that nothing waits for them."""
    b, number, base = _sequence(b, number, base, tile, length)
    position = (tile - base) * N
    blocks = block + b.to(gl.int64) * block_stride
    block_0 = _block(blocks, position, number, SIZE)
    block_1, block_2, block_3 = block_0, block_0, block_0
    if BOX <= 32:
        block_1 = _block(blocks, position + BOX, number, SIZE)
    if BOX <= 16:
        block_2 = _block(blocks, position + 2 * BOX, number, SIZE)
        block_3 = _block(blocks, position + 3 * BOX, number, SIZE)
    return b, number, base, position, (block_0, block_1, block_2, block_3)


@gluon.jit
def _rows(block, position, SIZE: gl.constexpr, BOX: gl.constexpr):
    """Where the boxes of a tile lie in the cache, by their blocks."""
    row_0 = block[0].to(gl.int32) * SIZE + position % SIZE
    row_1 = block[1].to(gl.int32) * SIZE + (position + BOX) % SIZE
    row_2 = block[2].to(gl.int32) * SIZE + (position + 2 * BOX) % SIZE
    row_3 = block[3].to(gl.int32) * SIZE + (position + 3 * BOX) % SIZE
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
    if left < N:
        here = gl.arange(0, N, gl.SliceLayout(0, SCORE)) < left
        score = gl.where(here[None, :], score, float("-inf"))
    higher = gl.maximum(best, gl.max(score, 1) * scale)
    weight = gl.exp2(score * scale - higher[:, None])
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
def _store(x, to, stride, head, column, G: gl.constexpr, LAYOUT: gl.constexpr):
    """Numbers of heads below G, from this head and column on."""
    x = gl.convert_layout(x, LAYOUT)
    g = head + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    c = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    gl.store(to + g[:, None] * stride + c[None, :], x, mask=(g < G)[:, None])


@gluon.jit
def _put(sums, mass, whole, out, part, out_head, head, column, G: gl.constexpr):
    """Half of each head's numbers: to its row or, where other programs have a part of the context, to what is left."""
    if whole:
        mean = sums * (1.0 / gl.where(mass > 0, mass, 1.0))[:, None]  # of an empty context, zeros
        _store(mean.to(out.dtype.element_ty), out, out_head, head, column, G, LINES)
    else:
        _store(sums, part, 2 * sums.shape[1], head, column, G, SUMS)


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
        whole, at = (base >= begin) & (end <= stop), (me * 2 + slot) * ROWS
        to, to_part = out + b.to(gl.int64) * out_stride, part + at.to(gl.int64) * (2 * C)
        full_mass = gl.convert_layout(mass, gl.SliceLayout(1, SUMS))
        _put(sums, full_mass, whole, to, to_part, out_head, pack * H, W * C, G)
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
    query_1, query_2, query_3 = queries_1.index(0), queries_2.index(0), queries_3.index(0)
    span, begin, stop, b, number, base = _span(length, B, programs, me, SLOTS)
    if W == 0:
        gl.store(cut + me * 3, -1)
        if begin < stop:
            _bring(queries, query_rests, (b * heads + pack * H, 0, 0, 0), query_1, query_2, query_3, asked.index(0))
    first, known = b, b - 1  # the program's first context, and the last whose queries have come
    last = gl.maximum(stop - 1, base)
    far = _look_up(gl.minimum(begin + W, last), b, number, base, length, block, block_stride, SIZE, BOX)
    if begin + W < stop:
        row = _rows(far[4], far[3], SIZE, BOX)
        _bring(rows, rests, row, keys_1.index(W), keys_2.index(W), keys_3.index(W), full.index(W))
    # its own tile after the next
    far = _look_up(gl.minimum(begin + W + 2, last), far[0], far[1], far[2], length, block, block_stride, SIZE, BOX)
    best = gl.full([H], LOWEST, gl.float32, gl.SliceLayout(1, SCORE))
    mass = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORE))
    sums = gl.full([H, C], 0.0, gl.float32, SUMS)
    slot = 0
    for pair in range(0, (stop - begin + 1) // 2):
        for turn in gl.static_range(2):
            tile, zero, owner = begin + 2 * pair + turn, _anew(0), _anew(turn)
            key_1, key_2, key_3 = keys_1.index(owner), keys_2.index(owner), keys_3.index(owner)
            value, best_there, mass_there = values.index(owner), bests.index(owner), masses.index(owner)
            if tile < stop:
                if turn == W:
                    query_1, query_2, query_3 = queries_1.index(zero), queries_2.index(zero), queries_3.index(zero)
                    if b != known:
                        mbarrier.wait(asked.index(0), (b - first) & 1)
                        known = b
                    mbarrier.wait(full.index(owner), pair & 1)
                    left = number - (tile - base) * N
                    if left < N:
                        _clear(key_1, key_2, left)
                    score = _score(query_1, query_2, query_3, key_1, key_2, key_3)
                    score = hopper.warpgroup_mma_wait(0, deps=[score])
                    if (left <= N) & (tile + 1 < stop):  # no one multiplies by these queries any more
                        head = (b + 1) * heads + pack * H
                        _bring(queries, query_rests, (head, 0, 0, 0), query_1, query_2, query_3, asked.index(0))
                    best, mass, fade = _weigh(
                        score, left, scale, best, mass, key_3, best_there, mass_there, handed.index(owner)
                    )
                    sums = _add_share(sums, fade, key_3, value)
                    mbarrier.wait(freed.index(owner), pair & 1)
                    if tile + 2 < stop:
                        row = _rows(far[4], far[3], SIZE, BOX)
                        _bring(rows, rests, row, key_1, key_2, key_3, full.index(owner))
                    far = _look_up(
                        gl.minimum(tile + 4, last), far[0], far[1], far[2], length, block, block_stride, SIZE, BOX
                    )
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
    asked = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    freed = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(asked.index(0), count=1)
    for j in gl.static_range(2):
        mbarrier.init(full.index(j), count=1)
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
