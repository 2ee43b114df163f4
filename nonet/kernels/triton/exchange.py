"""One-sided exchange over NVLink: kernels that push rows into other ranks' windows, wait for theirs, and pull results.

Used by the `nvlink` all-to-alls, which say what lies where in a window; specified by the contract of all-to-alls.
`epoch` counts this rank's exchanges on the device, so that a captured graph can be replayed; `wait` counts it up. A
rank has two flags on every rank. One grows by WHOLE with each push: every program adds its share once its rows are
there. The other is set to the epoch before a pull.
Waits end after `limit` (nanoseconds; in the interpreter polls): the late are then noted in `late` and, for the host, in
`told`, no later wait waits, and no flag is raised any more. `clock` is the last time seen.
Legend: T own tokens, D hidden, K top-k, R ranks, G slots of all ranks; addresses are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from nonet.kernels.triton import INTERPRETED
from nonet.kernels.triton.fp8 import quantized

CLOCK = tl.constexpr(not INTERPRETED)
WHOLE = tl.constexpr(4096)  # what a push adds to a flag in all; it has at most as many programs
POLLS = tl.constexpr(1 if INTERPRETED else 64)  # between two looks at the clock


@triton.jit
def _now(clock):
    """Nanoseconds, the same in every thread of the program: what an atomic operation returns is."""
    tl.atomic_max(clock, globaltimer())
    return tl.atomic_add(clock, 0)


@triton.jit
def await_flags(flags, height, epoch, late, told, clock, limit, R, RP: tl.constexpr):
    """Until all R flags have reached `height`; then what was written before they were raised can be read. Of those that
    have not in time, `epoch` is noted.

    All that is decided comes from atomic operations, whose results are the same in every thread of a program.
    """
    r = tl.arange(0, RP)
    mask = r < R
    polls, start, count = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), 1
    while count > 0:
        missing = mask & (tl.atomic_add(flags + r, 0, mask=mask, sem="acquire", scope="sys") < height)
        count = tl.sum(missing.to(tl.int32), axis=0)
        polls += 1
        if (count > 0) & (polls % POLLS == 0):  # seldom: looking at anything else would delay the next poll
            gave_up = tl.sum(tl.where(mask, tl.atomic_add(late + r, 0, mask=mask), 0), axis=0)
            now = _now(clock) if CLOCK else polls
            start = tl.where(polls == POLLS, now, start)
            if gave_up > 0:
                count = 0
            elif now - start > limit:
                tl.store(late + r, epoch, mask=missing)
                tl.store(told + r, epoch, mask=missing)
                count = 0
    tl.debug_barrier()


@triton.jit
def flags_of(window_R, offset, me, late, R, RP: tl.constexpr):
    """[RP] pointers to flag `me` of every rank, null past R. All are null for a rank that gave up on another: its rows
    may be of any epoch, so the others must give up on it."""
    r = tl.arange(0, RP)
    window = tl.load(window_R + r, mask=r < R, other=0)
    gave_up = tl.sum(tl.load(late + r, mask=r < R, other=0), axis=0)
    return tl.where((window != 0) & (gave_up == 0), window + offset + 8 * me, 0).to(tl.pointer_type(tl.int64))


@triton.jit
def raise_flags(flags, epoch):
    """After all that this program did and saw before."""
    tl.debug_barrier()
    tl.atomic_xchg(flags, epoch, mask=flags.to(tl.int64) != 0, sem="release", scope="sys")


@triton.jit
def _targets(slot, window_G, t, K, KP: tl.constexpr, EACH: tl.constexpr):
    """[KP] windows of the ranks that hold token t's slots: 0 for slots -1, and, unless EACH, for a rank's second."""
    k = tl.arange(0, KP)
    own = tl.load(slot + t * K + k, mask=k < K, other=-1)
    window = tl.load(window_G + own, mask=own >= 0, other=0)
    if not EACH:
        before = (window[:, None] == window[None, :]) & (k[None, :] < k[:, None])
        window = tl.where(tl.max(before.to(tl.int32), axis=1) > 0, 0, window)
    return window


@triton.jit
def _pick(window_K, k, KP: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, KP) == k, window_K, 0), axis=0)


@triton.jit
def _note(slot, weight, window_R, first_R, row, t, slot_at, weight_at, K, R, KP: tl.constexpr, RP: tl.constexpr):
    """Tell every rank token t's slots, counted from its first (elsewhere: negative or past its last), and weights."""
    r, k = tl.arange(0, RP), tl.arange(0, KP)
    own = tl.load(slot + t * K + k, mask=k < K, other=-1).to(tl.int32)
    of = tl.load(weight + t * K + k, mask=k < K, other=0.0)
    window = tl.load(window_R + r, mask=r < R, other=0)
    first = tl.load(first_R + r, mask=r < R, other=0)
    there = tl.where(own[None, :] >= 0, own[None, :] - first[:, None], -1)
    mask = (r[:, None] < R) & (k[None, :] < K)
    at = row * K + k[None, :]
    tl.store((window + slot_at).to(tl.pointer_type(tl.int32))[:, None] + at, there, mask=mask)
    of_RK = tl.broadcast_to(of[None, :].to(tl.float32), (RP, KP))
    tl.store((window + weight_at).to(tl.pointer_type(tl.float32))[:, None] + at, of_RK, mask=mask)


@triton.jit(do_not_specialize=["first", "T"])
def push(
    x, slot, weight, window_G, window_R, first_R, late, first, T, D, K, R, me,
    x_at, scale_at, slot_at, weight_at, flag_at,
    KP: tl.constexpr, RP: tl.constexpr, TOP: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Each token to every rank that holds one of its slots, as row first + t; then a share of this rank's flag on all.

    Programs share T x PARTS pieces of BD columns. FP8: as e4m3 with a factor for each 128 columns.
    """
    flags = flags_of(window_R, flag_at, me, late, R, RP)  # what the end needs, before it waits for anything
    for piece in range(tl.program_id(0), T * PARTS, tl.num_programs(0)):
        t = tl.cast(piece // PARTS, tl.int64)
        row = first + t
        if FP8:
            g, j = tl.arange(0, BD // 128), tl.arange(0, 128)
            d = (piece % PARTS) * BD + g[:, None] * 128 + j[None, :]
            value = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
            value, scale = quantized(value)
            part = (piece % PARTS) * (BD // 128) + g
        else:
            d = (piece % PARTS) * BD + tl.arange(0, BD)
            value = tl.load(x + t * D + d, mask=d < D, other=0.0)
        window_K = _targets(slot, window_G, t, K, KP, False)
        for k in tl.static_range(TOP):
            window = _pick(window_K, k, KP)
            to = tl.multiple_of((window + x_at).to(tl.pointer_type(value.dtype)), 16)
            tl.store(to + row * D + d, value, mask=(d < D) & (window != 0))
            if FP8:
                to_scale = (window + scale_at).to(tl.pointer_type(tl.float32))
                tl.store(to_scale + row * (D // 128) + part, scale, mask=(part < D // 128) & (window != 0))
        if piece % PARTS == 0:
            _note(slot, weight, window_R, first_R, row, t, slot_at, weight_at, K, R, KP, RP)
    tl.debug_barrier()  # after all that this program did
    others = tl.num_programs(0) - 1
    share = tl.where(tl.program_id(0) == 0, WHOLE - others, 1).to(tl.int64)
    tl.atomic_add(flags, share, mask=flags.to(tl.int64) != 0, sem="release", scope="sys")


@triton.jit
def wait(flags, epoch, late, told, clock, limit, R, RP: tl.constexpr):
    """Until every rank has pushed as often as this one; from here on that is the epoch. For one warp, so that no thread
    reads the epoch after another has counted it up."""
    now = tl.load(epoch) + 1
    tl.store(epoch, now)
    await_flags(flags, now * WHOLE, now, late, told, clock, limit, R, RP)


@triton.jit(do_not_specialize=["first", "T"])
def pull(
    slot, weight, window_G, window_R, ready, epoch, late, told, clock, limit, out, first, T, D, K, R, me,
    y_at, pair_at, ready_at,
    KP: tl.constexpr, RP: tl.constexpr, TOP: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Tell all ranks that this one's results can be read, wait for theirs, and add up each token's.

    One row of each rank, in order of the token's slots; EACH: one of each slot, by its place in the rank's table of
    pairs, times its weight. Added in float32 and rounded once.
    """
    now = tl.load(epoch)
    if tl.program_id(0) == 0:
        raise_flags(flags_of(window_R, ready_at, me, late, R, RP), now)
    has_waited = False
    for piece in range(tl.program_id(0), T * PARTS, tl.num_programs(0)):
        t = tl.cast(piece // PARTS, tl.int64)
        d = (piece % PARTS) * BD + tl.arange(0, BD)
        window_K = _targets(slot, window_G, t, K, KP, EACH)  # while flags are on their way
        if not has_waited:
            await_flags(ready, now, now, late, told, clock, limit, R, RP)
            has_waited = True
        total = tl.zeros([BD], tl.float32)
        for k in tl.static_range(TOP):
            window = _pick(window_K, k, KP)
            row, here = first + t, window != 0
            if EACH:
                row = tl.load((window + pair_at).to(tl.pointer_type(tl.int64)) + row * K + k, mask=here, other=0)
            y = tl.multiple_of((window + y_at).to(tl.pointer_type(out.dtype.element_ty)), 16)
            part = tl.load(y + row * D + d, mask=(d < D) & here, other=0.0).to(tl.float32)
            if EACH:
                part = part * tl.load(weight + t * K + k, mask=here, other=0.0).to(tl.float32)
            total += part
        tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)
    if not has_waited:  # a rank without tokens, too, goes on only when all are done with its rows
        await_flags(ready, now, now, late, told, clock, limit, R, RP)
