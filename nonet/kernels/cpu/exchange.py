"""The four compiled halves of a one-sided exchange between ranks that see each other's memory.

Used by `moe.all2all.shm`, which has the protocol; here are its copies and flags. Another rank's memory is an address,
and a flag word is epoch << 32 | number: stored after what it announces, read before it.
Legend: see moe/base.py; R ranks, B rows that one rank may send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from nonet.kernels.cpu import view
from nonet.kernels.cpu.routing import Pairs, assign
from nonet.kernels.cpu.rows import words
from nonet.kernels.cpu.scalar import f32, for_types, intrinsic, jit, put

NUMBER = (1 << 32) - 1
_SPINS = 300  # about a microsecond: then the waiting is the caller's, who yields the core


def addresses(parts: Sequence[Tensor]) -> np.ndarray:
    """Where each rank's part begins, int64 [R]; valid as long as the tensors' memory is."""
    return np.array([part.data_ptr() for part in parts], dtype=np.int64)


def send(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    bound_R: np.ndarray,
    to: tuple[np.ndarray, ...],
    me: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Copy each token once to every rank that has one of its slots, and its slots and weights as its note.

    `bound_R` [R + 1] holds the ranks' first slots and the end; `to` the addresses of rows, notes and flags. Returns
    (tokens that went to each rank [R, T], how many [R]).
    """
    R = len(bound_R) - 1
    token_RT, count_R = np.empty((R, x_TD.shape[0]), np.int64), np.zeros(R, np.int64)
    x, slot, weight = words(x_TD.contiguous()), slot_TK.contiguous().numpy(), weight_TK.contiguous().numpy()
    _send(x, slot, weight.view(np.int32), bound_R, *to, me, epoch, token_RT, count_R)
    return token_RT, count_R


def arrived(flag_R: np.ndarray, epoch: int) -> bool:
    """Whether the words at these addresses reach the epoch, within a few microseconds."""
    return bool(_arrived(flag_R, epoch, _SPINS))


def numbers(flag_R: np.ndarray) -> np.ndarray:
    """What the words at these addresses carry, int64 [R]."""
    out = np.empty(len(flag_R), np.int64)
    _numbers(flag_R, out)
    return out


def receive(x_RBD: Tensor, note_RBN: Tensor, count_R: np.ndarray, first: int, num_slots: int) -> tuple[Tensor, Pairs]:
    """The rows that came, [N, D] in order of rank, and their pairs as `routing.group` gives them."""
    N, K = int(count_R.sum()), note_RBN.shape[2] // 2
    x_ND = torch.empty((N, x_RBD.shape[2]), dtype=x_RBD.dtype)
    pairs = (
        torch.zeros(N * K, dtype=torch.int64),
        torch.zeros(N * K, dtype=torch.float32),
        torch.empty((N, K), dtype=torch.int64),
        torch.empty(num_slots, dtype=torch.int64),
        torch.empty(num_slots, dtype=torch.int64),
    )
    _receive(words(x_RBD), note_RBN.numpy(), count_R, first, words(x_ND), *(part.numpy() for part in pairs))
    return x_ND, pairs


def publish(y: Tensor, window: Tensor, count_R: np.ndarray, ready_R: np.ndarray, epoch: int) -> None:
    """Copy results into the window and tell each rank where its part starts, whose length is count_R."""
    _publish(words(y), words(window), count_R, ready_R, epoch)


def pull(y_R: np.ndarray, start_R: np.ndarray, sent: tuple[np.ndarray, np.ndarray], like: Tensor) -> Tensor:
    """[T, D] as `like`: each token's rows of all ranks' results, added in float32 in order of rank, rounded once."""
    out = torch.empty_like(like)
    _pull(y_R, start_R, *sent, view(out))
    return out


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _store_word(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _load_word(typing_context: Any, address: Any) -> Any:
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@jit(
    *(
        f"void({t}[:,::1], int64[:,::1], int32[:,::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, "
        "int64[:,::1], int64[::1])"
        for t in ("uint16", "uint32")
    )
)
def _send(x, slot, weight, bound, x_to, note_to, flag_to, me, epoch, token, count):
    T, K = slot.shape
    R = len(count)
    for turn in range(R):
        r = (me + 1 + turn) % R  # ranks start at different targets
        rows = carray(_pointer(x_to[r]), (T, x.shape[1]), x.dtype)
        notes = carray(_pointer(note_to[r]), (T, 2 * K), weight.dtype)
        n = 0
        for t in range(T):
            here = False
            for k in range(K):
                here |= bound[r] <= slot[t, k] < bound[r + 1]
            if here:
                rows[n] = x[t]
                for k in range(K):
                    notes[n, k], notes[n, K + k] = slot[t, k], weight[t, k]
                token[r, n] = t
                n += 1
        count[r] = n
        _store_word(flag_to[r], (epoch << 32) | n)


@jit("boolean(int64[::1], int64, int64)")
def _arrived(flag, epoch, spins):
    r = 0
    for _ in range(spins):
        while r < len(flag) and _load_word(flag[r]) >> 32 >= epoch:
            r += 1
        if r == len(flag):
            return True
    return False


@jit("void(int64[::1], int64[::1])")
def _numbers(flag, out):
    for r in range(len(flag)):
        out[r] = _load_word(flag[r]) & 0xFFFFFFFF


@jit(
    *(
        f"void({t}[:,:,::1], int32[:,:,::1], int64[::1], int64, {t}[:,::1], int64[::1], float32[::1], int64[:,::1], "
        "int64[::1], int64[::1])"
        for t in ("uint16", "uint32")
    )
)
def _receive(x, note, sent, first, x_out, row, weight, pair, start, count):
    N, K = pair.shape
    slots, weights = np.empty((N, K), np.int32), np.empty((N, K), np.int32)
    n = 0
    for r in range(len(sent)):
        for b in range(sent[r]):
            x_out[n] = x[r, b]
            slots[n], weights[n] = note[r, b, :K], note[r, b, K:]
            n += 1
    assign(slots, weights.view(np.float32), first, row, weight, pair, start, count)


@jit(*(f"void({t}[:,::1], {t}[:,::1], int64[::1], int64[::1], int64)" for t in ("uint16", "uint32")))
def _publish(y, window, count, ready, epoch):
    for n in range(len(y)):
        window[n] = y[n]
    start = 0
    for r in range(len(count)):
        _store_word(ready[r], (epoch << 32) | start)
        start += count[r]


@jit(*for_types("void(int64[::1], int64[::1], int64[:,::1], int64[::1], T[:,::1])"))
def _pull(y, start, token, count, out):
    T, D = out.shape
    total = np.zeros((T, D), np.float32)
    for r in range(len(count)):
        rows = carray(_pointer(y[r]), (start[r] + count[r], D), out.dtype)
        for n in range(count[r]):
            to, row = total[token[r, n]], rows[start[r] + n]
            for d in range(D):
                to[d] += f32(row[d])
    for t in range(T):
        to = out[t]
        for d in range(D):
            put(to, d, total[t, d])
