"""Scalars inside the compiled kernels: bfloat16 as 16 bits to float32 and back, and an exponential that vectorises.

Used by the other files here; knows no tensors.
"""

from __future__ import annotations

import warnings
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import overload

intrinsic: Any = numba.extending.intrinsic  # whose own type knows nothing of a call's arguments

# sums may be reordered and multiplications fused with additions; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz"}


def jit(*signatures: str, fast: bool = True) -> Any:
    """Compile for these signatures now, or read what an earlier process compiled. Releases the interpreter lock.

    Not fast: every operation is rounded as it stands.
    """
    options: dict[str, Any] = dict(fastmath=FAST if fast else False, nogil=True, boundscheck=False, error_model="numpy")

    def compiled(function: Any) -> Any:
        try:
            return njit(list(signatures), cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            remedy = "set NUMBA_CACHE_DIR to a folder that can be written"
            warnings.warn(f"CPU kernels are compiled again at each start: {remedy}", stacklevel=2)
            return njit(list(signatures), **options)(function)

    return compiled


def for_types(signature: str) -> tuple[str, str]:
    """The signature for bfloat16 and for float32; `T` in it stands for an element."""
    return signature.replace("T", "uint16"), signature.replace("T", "float32")


@intrinsic
def as_float(typing_context, bits):
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def as_bits(typing_context, value):
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


def f32(element):
    """An element of an array as float32."""
    raise NotImplementedError("only inside compiled code")


@overload(f32, inline="always")
def _f32(element):
    if isinstance(element, types.Integer):
        return lambda element: as_float(np.uint32(element) << np.uint32(16))
    return lambda element: element


def put(array, i, value):
    """array[i] = value, rounded to the nearest (ties to even) where the array is bfloat16."""
    raise NotImplementedError("only inside compiled code")


@njit(inline="always")
def bfloat16_bits(value):
    """The bits of a float32 rounded to the nearest bfloat16 (ties to even), in the lower half of a uint32."""
    bits = as_bits(np.float32(value))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000))  # it stays one; without a branch
    mask = np.uint32(np.uint32(0) - is_nan)
    return (nearest & ~mask) | (np.uint32(0x7FC0) & mask)


@overload(put, inline="always")
def _put(array, i, value):
    if isinstance(array.dtype, types.Integer):

        def rounded(array, i, value):
            array[i] = np.uint16(bfloat16_bits(value))

        return rounded

    def plain(array, i, value):
        array[i] = value

    return plain


@njit(inline="always")
def order(value):
    """An int32 that is larger for a larger float32: comparing these vectorises. -0 comes before 0."""
    bits = np.int32(as_bits(value))
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(inline="always")
def exp(x):
    """e ** x in float32, to about two units in the last place (polynomial of Cephes' expf); below -87 as at -87."""
    x = max(min(x, np.float32(88.0)), np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
