"""A 5-gram language model with interpolated modified Kneser-Ney smoothing, in numpy.

The yardstick for nonet-tiny: it is trained on the same training tokens, on all kinds together and on
each kind alone, and the stronger of the two counts. n-grams are stored as a trie of sorted keys
(id of the (n-1)-gram before) * vocabulary + token, so any vocabulary and order fit in 64 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class KneserNey:
    """Modified Kneser-Ney of Chen and Goodman: three discounts an order, all orders interpolated."""

    def __init__(self, tokens: NDArray[np.uint16], vocab: int, order: int = 5) -> None:
        self.vocab, self.order = vocab, order
        self.keys: list[Ints] = []      # by order: sorted keys of the seen n-grams
        self.top: list[Floats] = []     # by order: (count - discount) / total of its context
        self.gamma: list[Floats] = []   # by order: mass left to the lower order, by context id
        toks = tokens.astype(np.int64)
        ids = np.zeros(len(toks) + 1, np.int64)  # id of the empty n-gram that ends before each token
        raw: list[tuple[Ints, Ints]] = []
        suffix = np.zeros(0, np.int64)
        suffixes: list[Ints] = []
        for n in range(1, order + 1):
            # ids[i]: id of the (n-1)-gram ending with token i-1; positions before n-1 are dropped
            key = ids[:-1][n - 1:] * vocab + toks[n - 1:] if n > 1 else toks.copy()
            uniq, first, inv, cnt = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            suffix = ids[1:][n - 1:][first] if n > 1 else np.zeros(len(uniq), np.int64)
            new = np.full(len(toks) + 1, -1, np.int64)
            new[n:] = inv
            ids = new
            self.keys.append(uniq)
            raw.append((uniq, cnt.astype(np.int64)))
            suffixes.append(suffix)
        for n in range(1, order + 1):
            uniq, cnt = raw[n - 1]
            if n < order:  # continuation counts: how many different tokens come before
                cnt = np.bincount(suffixes[n], minlength=len(uniq)).astype(np.int64)
            self._level(n, uniq, cnt)

    def _level(self, n: int, uniq: Ints, cnt: Ints) -> None:
        ctx = uniq // self.vocab if n > 1 else np.zeros(len(uniq), np.int64)
        size = len(self.keys[n - 2]) if n > 1 else 1
        n1, n2, n3, n4 = (float((cnt == k).sum()) for k in (1, 2, 3, 4))
        y = n1 / max(1.0, n1 + 2 * n2)
        d = np.array([0.0, 1 - 2 * y * n2 / max(1.0, n1), 2 - 3 * y * n3 / max(1.0, n2),
                      3 - 4 * y * n4 / max(1.0, n3)]).clip(0.0, 3.0)
        d[1:] = np.minimum(np.maximum(d[1:], 0.1), [0.99, 1.99, 2.99])
        disc = d[np.minimum(cnt, 3)]
        total = np.bincount(ctx, weights=cnt, minlength=size)
        left = np.bincount(ctx, weights=np.minimum(disc, cnt), minlength=size)
        safe = np.maximum(total, 1e-9)
        self.top.append(np.maximum(cnt - disc, 0.0) / safe[ctx])
        self.gamma.append(np.where(total > 0, left / safe, 1.0))

    def logprobs(self, tokens: NDArray[np.uint16]) -> Floats:
        """log2 probability of every token but the first, each given up to order-1 tokens before it."""
        toks = tokens.astype(np.int64)
        prob = np.full(len(toks), 1.0 / self.vocab)
        before = np.zeros(len(toks), np.int64)  # id of the (n-1)-gram that ends before each token
        for n in range(1, self.order + 1):
            key = before * self.vocab + toks if n > 1 else toks
            pos = np.minimum(np.searchsorted(self.keys[n - 1], key), len(self.keys[n - 1]) - 1)
            hit = (self.keys[n - 1][pos] == key) & (before >= 0)
            known = before >= 0
            g = np.where(known, self.gamma[n - 1][np.maximum(before, 0)], 1.0)
            prob = np.where(known, np.where(hit, self.top[n - 1][pos], 0.0) + g * prob, prob)
            before = np.concatenate([[-1], np.where(hit, pos, -1)[:-1]])
        return np.log2(prob[1:])
