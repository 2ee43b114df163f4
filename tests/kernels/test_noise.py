"""Noise for sampling: the formula, its distribution, and that keys and places are independent."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from nonet.kernels import noise
from nonet.kernels.cpu import noise as compiled

KEYS = [(k * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64 for k in range(200)]


def make(key: int, count: int) -> np.ndarray:
    return compiled.exponential(key, torch.full((count,), torch.nan)).numpy()


def test_compiled_or_plain_the_bits_are_the_same():
    for key in (0, 1, 2**32, 2**64 - 1, *KEYS[:3]):
        assert np.array_equal(make(key, 50_000), noise.exponential(key, 50_000))
    assert len(make(5, 0)) == len(noise.exponential(5, 0)) == 0


def test_the_logarithm_is_one():
    """The same uniform numbers in float64."""
    with np.errstate(over="ignore"):
        x = (np.arange(50_000, dtype=np.uint32) ^ np.uint32(9)) * np.uint32(noise.HASH[0])
        x = (x ^ (x >> np.uint32(15))) * np.uint32(noise.HASH[1])
        x = (x ^ (x >> np.uint32(13))) * np.uint32(noise.HASH[2])
    want = -np.log((((x ^ (x >> np.uint32(16))) >> np.uint32(9)).astype(np.float64) + 0.5) * 2.0**-23)
    assert (np.abs(make(9, 50_000) - want) <= 2e-7 * want).all()


def test_the_bits_are_the_same_everywhere():
    said = hashlib.sha256(make(42, 1000).tobytes()).hexdigest()
    assert said == "1af22f04befd09c0c1fb8976acbc993e6f36bba227c75cd3f1bce63776509fa1"
    assert np.array_equal(make(42, 1000), make(42, 5000)[:1000])  # a longer vocabulary changes nothing before


def test_it_is_exponential():
    """Kolmogorov and Smirnov's distance of eight million numbers; 1.95 would be met by chance once in a thousand."""
    sorted_N = np.sort(np.concatenate([make(key, 40_000) for key in KEYS])).astype(np.float64)
    count = len(sorted_N)
    distance = np.abs(1 - np.exp(-sorted_N) - (np.arange(count) + 0.5) / count).max()
    assert distance * count**0.5 < 1.95
    assert 0 < sorted_N[0] < 1e-6
    assert 13 < sorted_N[-1] < 17


def test_the_least_is_anywhere():
    """Which place has the least number: all of 100 alike, over 20,000 neighbouring keys (chi squared, 99 degrees)."""
    found = [int(make(key, 100).argmin()) for key in range(20_000)]
    count = np.bincount(found, minlength=100)
    assert ((count - 200) ** 2 / 200).sum() < 160


def test_keys_and_places_are_independent():
    table = np.stack([make(key, 20_000) for key in KEYS])
    limit = 5 / table.size**0.5
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < limit
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < limit
