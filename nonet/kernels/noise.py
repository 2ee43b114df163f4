"""Random numbers of exponential distribution that depend on a key and their place only, the same bits everywhere.

Used by the sampler, for logits on a GPU too. A hash of key and place in 32 bits, by rounds of multiplying and shifted
exclusive or (as at the end of MurmurHash3, A. Appleby), then a logarithm (that of Cephes, S. Moshier) in float32,
without any step that processors may round differently. `kernels.cpu.noise` is the same compiled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# of the logarithm: (log(1 + f) - f + f^2 / 2) / f^3, and log(2) in two parts
TERMS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG2_LOW, LOG2_HIGH = -2.12194440e-4, 0.693359375
HASH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


def exponential(key: int, count: int) -> npt.NDArray[np.float32]:
    """[count] numbers of mean 1, of at least 2^-24. key: 64 bits."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    with np.errstate(over="ignore"):
        x = (np.arange(count, dtype=np.uint32) ^ low) * np.uint32(HASH[0])
        x = ((x ^ (x >> np.uint32(15))) + high) * np.uint32(HASH[1])
        x = (x ^ (x >> np.uint32(13))) * np.uint32(HASH[2])
        x = x ^ (x >> np.uint32(16))
    uniform = ((x >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)  # exact: not 0, not 1
    m, exponent = np.frexp(uniform)
    below = m < np.float32(0.70710678)
    e, f = (exponent - below).astype(np.float32), np.where(below, m + m, m) - np.float32(1)
    z, y = f * f, np.full_like(f, TERMS[0])
    for term in TERMS[1:]:
        y = y * f + np.float32(term)
    y = y * f * z + e * np.float32(LOG2_LOW) - np.float32(0.5) * z
    return np.asarray(-(f + y + e * np.float32(LOG2_HIGH)), dtype=np.float32)
