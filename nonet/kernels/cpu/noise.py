"""`kernels.noise` compiled: the same operations, one place after the other, nothing fused or reordered."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nonet.kernels.cpu.scalar import as_bits, as_float, jit
from nonet.kernels.noise import HASH, LOG2_HIGH, LOG2_LOW, TERMS

_TERMS = np.array(TERMS, dtype=np.float32)


def exponential(key: int, out_V: Tensor) -> Tensor:
    """Fill out_V, float32 [V]; returned."""
    _fill(np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), out_V.numpy())
    return out_V


@jit("void(uint32, uint32, float32[::1])", fast=False)
def _fill(low, high, out_V):
    for v in range(len(out_V)):
        x = np.uint32((np.uint32(v) ^ low) * np.uint32(HASH[0]))
        x = np.uint32(np.uint32((x ^ (x >> np.uint32(15))) + high) * np.uint32(HASH[1]))
        x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(HASH[2]))
        x = np.uint32(x ^ (x >> np.uint32(16)))
        bits = as_bits((np.float32(x >> np.uint32(9)) + np.float32(0.5)) * np.float32(2.0**-23))
        exponent = np.int32(bits >> np.uint32(23)) - np.int32(126)
        m = as_float((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F000000))  # as frexp has them
        below = m < np.float32(0.70710678)
        e = np.float32(exponent - np.int32(1)) if below else np.float32(exponent)
        f = (m + m if below else m) - np.float32(1)
        z, y = f * f, _TERMS[0]
        for t in range(1, len(_TERMS)):
            y = y * f + _TERMS[t]
        y = y * f * z + e * np.float32(LOG2_LOW) - np.float32(0.5) * z
        out_V[v] = -(f + y + e * np.float32(LOG2_HIGH))
