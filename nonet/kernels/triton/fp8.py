"""Rows to 8-bit floats inside a kernel, as `kernels.fp8.quantize_rows` specifies and to the same last bit.

Used by kernels that quantise what they have just computed or are about to send.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nonet.kernels.fp8 import LARGEST, LEAST
from nonet.kernels.triton import INTERPRETED

_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)
_WIDE = tl.constexpr(INTERPRETED)


@triton.jit
def quantized(x):
    """(e4m3 [n, 128], float32 factors [n]) of rows of 128 numbers in float32."""
    factor = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), _LEAST), _LARGEST)
    x = x * tl.div_rn(1.0, factor)[:, None]
    if _WIDE:  # the interpreter rounds to e4m3 wrongly where it should carry: round to its 3 bits before
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True) | (bits & -0x80000000)
        x = tl.where(tl.abs(x) < 2.0**-6, small.to(tl.float32, bitcast=True), normal)
    return x.to(tl.float8e4nv), factor
