"""What a source rank does by itself with its tokens for an expert that has several replicas: its quota by slot.

`even` is the rule of `moe.lookup`: replicas in turn, beginning at the rank's own number. `average` follows shares that
all ranks know from a running average. `hashed` is vLLM's rule, for comparison. The simulator plays all ranks at once,
the engine one. No rule asks for other ranks' counts; `quota` has what they can do together.
Legend: L MoE layers, E experts, R source ranks, G global slots; see `replicas` for the rest.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nonet.eplb.policies._jit import jit
from nonet.eplb.quota import GOLDEN
from nonet.eplb.replicas import Replicas

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RULES = ("even", "average", "hashed")
_SMALL = 1e-9  # what is missing to a whole token by rounding of floats
_SIZE = 8  # a token's experts, for the token numbers that `hashed` needs


def even_quota(count_E: npt.ArrayLike, replicas: Replicas, layer: int, rank: int) -> Ints:
    """int64 [G]: tokens of rank `rank` by slot, replicas taken in turn; within 1 of each other."""
    return _own("even", count_E, np.zeros(replicas.host_LG.shape[1]), replicas, layer, rank)


def own_quota(count_E: npt.ArrayLike, share_G: Floats, replicas: Replicas, layer: int, rank: int) -> Ints:
    """int64 [G]: tokens of rank `rank` by slot, by average shares [G] that sum to 1 an expert.

    Each slot gets within 1 of count x share. What rounding leaves over differs from rank to rank (its number times the
    golden ratio), so that ranks with equal counts do not all favour the same slot. No preference for near slots: it
    would add noise to every slot's sum, which nobody could correct without the others' counts.
    """
    return _own("average", count_E, share_G, replicas, layer, rank)


def slot_sums(
    rule: str,
    count_LE: Ints,
    replicas: Replicas,
    *,
    share_LG: Floats | None = None,
    count_RLE: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Ints:
    """int64 [L, G]: tokens by slot if every source rank follows a rule by itself.

    count_LE: tokens of all sources; count_RLE: those of each, else every token's source is drawn (`seed`), all ranks
    being as likely. share_LG is for "average".
    """
    shares = np.zeros(replicas.host_LG.shape) if share_LG is None else np.ascontiguousarray(share_LG)
    given = np.zeros((0, 0, 0), np.int64) if count_RLE is None else np.ascontiguousarray(count_RLE, dtype=np.int64)
    out_LG = np.zeros(shares.shape, np.int64)
    ranks = replicas.placement.fleet.num_ranks if count_RLE is None else len(given)
    count = np.ascontiguousarray(count_LE, dtype=np.int64)
    numbers = np.zeros(ranks, np.int64) + np.arange(ranks)
    kind = RULES.index(rule)
    _slot_sums(kind, count, given, numbers, shares, replicas.order_LG, replicas.count_LE, seed, out_LG)
    return out_LG


def _own(rule: str, count_E: npt.ArrayLike, share_G: Floats, replicas: Replicas, layer: int, rank: int) -> Ints:
    count_LE = np.ascontiguousarray(count_E, dtype=np.int64)[None]
    out_LG = np.zeros((1, len(share_G)), np.int64)
    shares = np.ascontiguousarray(share_G, dtype=np.float64)[None]
    rows = slice(layer, layer + 1)
    order_LG, count_of_LE = replicas.order_LG[rows], replicas.count_LE[rows]
    numbers = np.array([rank])
    _slot_sums(RULES.index(rule), count_LE, count_LE[None], numbers, shares, order_LG, count_of_LE, 0, out_LG)
    return out_LG[0]


@jit
def _slot_sums(
    rule: int, count_LE: Ints, count_RLE: Ints, rank_R: Ints, share_LG: Floats, order_LG: Ints, replicas_LE: Ints,
    seed: int, out_LG: Ints,
) -> None:  # fmt: skip
    """Add each source's tokens to out_LG; rank_R are the sources' numbers."""
    source_R = np.empty(len(rank_R), np.int64)
    state = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x1234567)
    for layer in range(len(count_LE)):
        begin = 0
        batch = max(1, count_LE[layer].sum() // (len(rank_R) * _SIZE))  # tokens of a source
        for e in range(count_LE.shape[1]):
            slots = order_LG[layer, begin : begin + replicas_LE[layer, e]]
            begin += len(slots)
            if len(slots) == 1:
                out_LG[layer, slots[0]] += count_LE[layer, e]
                continue
            if len(count_RLE):
                source_R[:] = count_RLE[:, layer, e]
            else:
                source_R[:] = 0
                for _ in range(count_LE[layer, e]):
                    state, draw = _draw(state, len(rank_R))
                    source_R[draw] += 1
            for r in range(len(rank_R)):
                if rule == 0:
                    _even(source_R[r], rank_R[r], slots, out_LG[layer])
                elif rule == 1:
                    _average(source_R[r], (rank_R[r] * GOLDEN) % 1.0, slots, share_LG[layer], out_LG[layer])
                else:
                    state = _hashed(source_R[r], batch, state, slots, out_LG[layer])


@jit
def _even(count: int, rank: int, slots: Ints, out_G: Ints) -> None:
    n = len(slots)
    for i in range(n):
        out_G[slots[i]] += count // n + ((i - rank) % n < count % n)


@jit
def _average(count: int, offset: float, slots: Ints, share_G: Floats, out_G: Ints) -> None:
    """Systematic sampling: token j stands at (j + offset) / count, and slots own consecutive parts of 0 to 1."""
    done, edge = 0, 0.0
    for i in range(len(slots)):
        edge += share_G[slots[i]]
        until = int(math.ceil(count * edge - offset - _SMALL)) if i < len(slots) - 1 else count
        until = min(max(until, done), count)
        out_G[slots[i]] += until - done
        done = until


@jit
def _hashed(count: int, batch: int, state: np.uint64, slots: Ints, out_G: Ints) -> np.uint64:
    """`count` of the tokens 0 .. batch - 1 at random; token t takes replica (t x 2654435769 mod 2^32) mod replicas."""
    batch = max(batch, count)
    left = count
    for t in range(batch):
        state, draw = _draw(state, batch - t)
        if draw < left:
            left -= 1
            out_G[slots[((t * 2654435769) & 0xFFFFFFFF) % len(slots)]] += 1
    return state


@jit
def _draw(state: np.uint64, below: int) -> tuple[np.uint64, np.int64]:
    """(next state, a number in 0 .. below - 1): splitmix64 (Steele, Lea, Flood 2014), high bits scaled."""
    state += np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return state, np.int64(((z >> np.uint64(32)) * np.uint64(below)) >> np.uint64(32))
