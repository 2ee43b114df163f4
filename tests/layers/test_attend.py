"""Attention over the paged cache against the plain definition in float64, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import Paged, random_spans

from nonet.layers.attention import PLAIN, Sight, attend

MAX_LEN = 13


def plain(q_THd: torch.Tensor, cache, paged: Paged, spans, sight: Sight = PLAIN) -> torch.Tensor:
    """Each new token: softmax of its scaled products with the keys up to itself, over their values. In float64."""
    group = q_THd.shape[1] // cache[0].shape[1]
    keys, values = (part.double().repeat_interleave(group, dim=1) for part in cache)
    out, row = torch.empty_like(q_THd, dtype=torch.float64), 0
    for blocks, start, count in spans:
        for position in range(start, start + count):
            seen = range(position + 1)
            seen = [c for c in seen if sight.window is None or position - c < sight.window]
            seen = [c for c in seen if sight.chunk is None or c // sight.chunk == position // sight.chunk]
            places = paged.positions(blocks, position + 1)[seen]
            q_Hd = q_THd[row].double()
            scale = 1 / math.sqrt(q_Hd.shape[-1]) if sight.scale is None else sight.scale
            score_HC = torch.einsum("hd,chd->hc", q_Hd, keys[places]) * scale
            sink_H1 = torch.full_like(score_HC[:, :1], -torch.inf)
            if sight.sink_H is not None:
                sink_H1[:, 0] = sight.sink_H
            weight_HC = torch.cat([score_HC, sink_H1], dim=1).softmax(-1)[:, :-1]
            out[row] = torch.einsum("hc,chd->hd", weight_HC, values[places])
            row += 1
    return out


def inputs(paged: Paged, spans, heads: int, kv_heads: int, head_dim: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(count for _, _, count in spans)
    q_THd = torch.randn(tokens, heads, head_dim, generator=generator)
    cache = tuple(torch.randn(paged.places, kv_heads, head_dim, generator=generator) for _ in range(2))
    return q_THd, cache


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 4), (4, 1, 6), (1, 1, 2)])
def test_random_mixes_of_decoding_and_chunks(seed, heads, kv_heads, head_dim):
    paged = Paged(num_blocks=7 * MAX_LEN, block_size=[1, 2, 3, 16][seed % 4], seed=seed)
    spans = random_spans(paged, seed, MAX_LEN)
    q_THd, cache = inputs(paged, spans, heads, kv_heads, head_dim, seed)
    got = attend(q_THd, cache, paged.attention(spans))
    assert got.shape == q_THd.shape
    torch.testing.assert_close(got.double(), plain(q_THd, cache, paged, spans), atol=2e-6, rtol=2e-6)


SINK_H = torch.tensor([1.5, -2.0, 0.0, 3.0, -0.5, 0.7])
SIGHTS = {
    "window": Sight(window=4),
    "of-one": Sight(window=1),
    "longer-than-all": Sight(window=99, chunk=99),
    "chunk": Sight(chunk=5),
    "both": Sight(window=3, chunk=4),
    "sinks": Sight(sink_H=SINK_H, scale=0.9),
    "window-and-sinks": Sight(window=6, sink_H=SINK_H),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SIGHTS)
def test_what_a_token_sees(name, seed, dtype):
    """float64 takes plain PyTorch, float32 the compiled kernel where sequences decode."""
    paged, sight = Paged(num_blocks=7 * MAX_LEN, block_size=[1, 2, 3, 16][seed], seed=seed), SIGHTS[name]
    spans = random_spans(paged, seed, MAX_LEN)
    q_THd, cache = inputs(paged, spans, 6, 2, 8, seed)
    got = attend(q_THd.to(dtype), tuple(part.to(dtype) for part in cache), paged.attention(spans), sight)
    torch.testing.assert_close(got.double(), plain(q_THd, cache, paged, spans, sight), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["window", "chunk", "window-and-sinks"])
def test_what_lies_before_may_be_no_number(name, dtype):
    """As nothing is read there, it could be given back one day."""
    paged, sight = Paged(num_blocks=40, block_size=2), SIGHTS[name]
    spans = [(paged.take(12), 11, 1), (paged.take(13), 11, 2)]
    q_THd, cache = inputs(paged, spans, 6, 2, 8, seed=4)
    q_THd, cache = q_THd.to(dtype), tuple(part.to(dtype) for part in cache)
    before = attend(q_THd, cache, paged.attention(spans), sight)
    first = [sight.first(start) for _, start, _ in spans]
    assert min(first) > 0
    for (blocks, _, _), count in zip(spans, first, strict=True):
        for part in cache:
            part[paged.positions(blocks, count)] = torch.nan
    assert torch.equal(attend(q_THd, cache, paged.attention(spans), sight), before)


@pytest.mark.parametrize(
    "kinds", [[(5, 1)], [(0, 1)], [(0, 7)], [(4, 3)], [(11, 1), (2, 1), (0, 1)], [(3, 1), (0, 2)]], ids=str
)
def test_each_kind_of_step(kinds):
    paged = Paged(num_blocks=40, block_size=4)
    spans = [(paged.take(start + count), start, count) for start, count in kinds]
    q_THd, cache = inputs(paged, spans, 4, 2, 8, seed=1)
    got = attend(q_THd, cache, paged.attention(spans))
    torch.testing.assert_close(got.double(), plain(q_THd, cache, paged, spans), atol=2e-6, rtol=2e-6)


def test_a_sequence_gets_the_same_whatever_runs_beside_it():
    paged = Paged(num_blocks=40, block_size=4)
    own = (paged.take(9), 8, 1)
    others = [(paged.take(3), 2, 1), (paged.take(12), 11, 1)]
    q_THd, cache = inputs(paged, [own, *others], 4, 2, 8, seed=2)
    alone = attend(q_THd[:1], cache, paged.attention([own]))
    beside = attend(q_THd, cache, paged.attention([own, *others]))
    torch.testing.assert_close(beside[:1], alone, atol=1e-6, rtol=1e-6)


def test_nothing_beyond_the_own_context_is_seen():
    """Later positions of the own blocks and all other blocks may hold any number."""
    paged = Paged(num_blocks=20, block_size=4)
    spans = [(paged.take(6), 5, 1), (paged.take(11), 10, 1), (paged.take(5), 2, 3)]
    q_THd, cache = inputs(paged, spans, 4, 2, 8, seed=3)
    before = attend(q_THd, cache, paged.attention(spans))
    used = torch.cat([paged.positions(blocks, start + count) for blocks, start, count in spans])
    other = torch.ones(paged.places, dtype=torch.bool)
    other[used] = False
    for part in cache:
        part[other] = 1e30
    assert torch.equal(attend(q_THd, cache, paged.attention(spans)), before)


def test_a_sequence_that_went_wrong_does_not_spoil_the_others():
    """What stands in the blocks of others, or in free ones, may even be no number."""
    paged = Paged(num_blocks=20, block_size=4)
    paged.free.remove(0)
    spans = [(paged.take(6), 5, 1), (paged.take(11), 10, 1), (paged.take(5), 2, 3)]
    q_THd, cache = inputs(paged, spans, 4, 2, 8, seed=3)
    before = attend(q_THd, cache, paged.attention(spans))
    used = torch.cat([paged.positions(blocks, start + count) for blocks, start, count in spans])
    other = torch.ones(paged.places, dtype=torch.bool)
    other[used] = False
    for part in cache:
        part[other] = torch.nan
    assert torch.equal(attend(q_THd, cache, paged.attention(spans)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sight", [PLAIN, SIGHTS["both"], SIGHTS["window-and-sinks"]])
def test_half_precision_stays_near_the_plain_definition(sight, dtype):
    paged = Paged(num_blocks=60, block_size=4)
    spans = random_spans(paged, seed=5, max_len=MAX_LEN)
    q_THd, cache = inputs(paged, spans, 6, 2, 8, seed=5)
    q_THd, cache = q_THd.to(dtype), tuple(part.to(dtype) for part in cache)
    got = attend(q_THd, cache, paged.attention(spans), sight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), plain(q_THd, cache, paged, spans, sight), atol=2e-2, rtol=2e-2)


def test_what_kernels_are_told_of_prompts_is_what_the_plain_form_is_told():
    spans = [(5, 1), (0, 7), (4, 3), (9, 12)]
    batches = []
    for backend in ("reference", "triton"):
        paged = Paged(num_blocks=40, block_size=4, backend=backend)
        batches.append(paged.attention([(paged.take(start + count), start, count) for start, count in spans]))
    plain, batch = batches
    prompts = batch.prompts
    assert plain.prompts is None
    assert torch.equal(prompts.place_C, torch.cat([part.place_C for part in plain.prefills]))
    assert [part.place_C.tolist() for part in batch.prefills] == [part.place_C.tolist() for part in plain.prefills]
    assert prompts.first_P.tolist() == [part.first for part in plain.prefills] == [1, 8, 11]
    assert prompts.count_P.tolist() == [7, 3, 12]
    assert prompts.context_P.tolist() == [7, 7, 21]
    assert prompts.begin_P.tolist() == [0, 7, 14]
    assert [row[0] * 4 for row in prompts.block_PN.tolist()] == [int(part.place_C[0]) for part in plain.prefills]
    assert prompts.pairs == sum(position + 1 for start, count in spans[1:] for position in range(start, start + count))
