"""Prompts' attention in Triton against the plain form: on a GPU, or on CPU tensors in Triton's interpreter.

Run by test_prefill.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nonet.engine.batch import BatchBuilder
from nonet.engine.messages import StepBatch
from nonet.kernels.triton import INTERPRETED, prefill
from nonet.kernels.triton.prefill import Tile
from nonet.layers.attention import PLAIN, AttentionBatch, Sight, attend

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the largest value
SPANS = [(11, 1), (0, 7), (11, 9), (30, 22), (3, 2)]  # (context before, new tokens): the first one decodes


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def step(spans: list[tuple[int, int]], block_size: int, backend: str) -> tuple[AttentionBatch, int]:
    """A step's batch over blocks in no order, and how many there are."""
    blocks = [-(-(start + count) // block_size) for start, count in spans]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(2)).tolist()
    ends = torch.tensor([0, *blocks]).cumsum(0).tolist()
    tokens = sum(count for _, count in spans)
    batch = StepBatch(
        tokens=[0] * tokens,
        starts=[start for start, _ in spans],
        counts=[count for _, count in spans],
        blocks=[order[a:b] for a, b in pairwise(ends)],
    )
    builder = BatchBuilder(block_size, 0, 1, torch.device(DEVICE), backend)
    return builder.build(batch, [tokens]).attention, sum(blocks)


def places(batch: AttentionBatch) -> torch.Tensor:
    """Those that some sequence of the step has."""
    own = [batch.decode_block_BN[b] * batch.block_size for b in range(batch.num_decode)]
    decoding = [
        (first[:, None] + torch.arange(batch.block_size, device=DEVICE)).flatten()[:length]
        for first, length in zip(own, batch.decode_length_B.tolist(), strict=True)
    ]
    return torch.cat([*decoding, *(part.place_C for part in batch.prefills)])


def check(
    shape: tuple[int, int, int] = (4, 2, 32),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sight: Sight = PLAIN,
    spans: list[tuple[int, int]] | None = None,
    unseen: int = 0,
) -> None:
    """`attend` by kernels against the plain form in float32. Queries are a part of wider rows; NaN stands where no
    context is, and in so many places of each that none of its new tokens sees."""
    spans, (H, h, d) = spans or SPANS, shape
    batch, num_blocks = step(spans, block_size, "triton")
    plain, _ = step(spans, block_size, "reference")
    q_THd = draw(sum(count for _, count in spans), H + 3, d, dtype=dtype)[:, :H]
    keys, values = draw(2, num_blocks * block_size, h, d, dtype=dtype).unbind()
    want = attend(q_THd.float().contiguous(), (keys.float(), values.float()), plain, sight)
    used = torch.zeros(len(keys), dtype=torch.bool, device=DEVICE)
    used[places(batch)] = True
    keys[~used] = values[~used] = torch.nan
    for part in batch.prefills:
        first = part.place_C[: min(unseen, sight.first(len(part.place_C) - part.count))]
        keys[first] = values[first] = torch.nan
    got = attend(q_THd, (keys, values), batch, sight)
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max()) <= TOLERANCE[dtype] * float(want.abs().max())


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """In the interpreter, where every program takes its time."""
    if INTERPRETED:
        monkeypatch.setattr(prefill, "choose", lambda *shape: Tile(16, 16, 4, 2))


def sinks(H: int) -> torch.Tensor:
    return draw(H, dtype=torch.float32) * 3


SIGHTS = {
    "window": Sight(window=20),
    "of-one": Sight(window=1),
    "longer-than-all": Sight(window=99, chunk=99),
    "chunk": Sight(chunk=20),
    "both": Sight(window=9, chunk=12),
    "sinks": Sight(sink_H=sinks(4), scale=0.9),
    "window-and-sinks": Sight(window=20, sink_H=sinks(4)),
}


@pytest.mark.parametrize("name", SIGHTS)
def test_what_a_token_sees(name):
    check(sight=SIGHTS[name], unseen=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(dtype=dtype, sight=SIGHTS["window-and-sinks"])


SHAPES = [(4, 4, 16), (6, 2, 24), (8, 1, 6), (5, 1, 48)]
LARGE = [] if INTERPRETED else [(32, 4, 128), (16, 2, 96), (64, 8, 64), (8, 2, 256), (7, 1, 80), (40, 8, 128)]


@pytest.mark.parametrize("block_size", [3, 64])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_widths_and_heads(shape, block_size):
    check(shape, block_size)


@pytest.mark.skipif(INTERPRETED, reason="a GPU's tiles")
@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(torch.bfloat16, 1), (torch.bfloat16, 16), (torch.bfloat16, 64), (torch.float16, 256), (torch.float32, 16)],
)
@pytest.mark.parametrize("shape", [(32, 4, 128), (64, 8, 64)], ids=str)
def test_long_prompts(shape, dtype, block_size):
    sight = Sight(window=300, sink_H=sinks(64)) if shape[0] == 64 else PLAIN
    spans = [(700, 1), (0, 1000), (333, 129), (2000, 2), (64, 64), (127, 385)]
    check(shape, block_size, dtype, sight, spans, unseen=30)


@pytest.mark.parametrize("spans", [[(0, 2)], [(40, 3)], [(0, 16), (16, 16)], [(5, 1), (2, 1)]], ids=str)
def test_each_kind_of_step(spans):
    check(spans=spans)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(6, 4, 8), (16, 32, 16)] + ([] if INTERPRETED else [(128, 64, 128)]), ids=str)
def test_a_context_in_one_piece_with_keys_that_share_a_part(widths, dtype):
    """As multi-head latent attention makes them: keys wider than values, rows of several contexts end to end."""
    H, (n, r, width) = 4, widths
    counts, contexts = [7, 30], [19, 30]
    made = draw(sum(contexts), H, n + width, dtype=dtype)
    shared = draw(sum(contexts), r + 8, dtype=dtype)[:, 8:]
    q_THd = draw(sum(counts), H, n + r, dtype=dtype)
    out = torch.full((sum(counts), H, width), torch.nan, dtype=dtype, device=DEVICE)
    first, count, context, begin = torch.tensor([[0, 7], counts, contexts, [0, 19]], device=DEVICE)
    k, v = made.split((n, width), dim=2)
    prefill.prefill(q_THd, k, v, begin[:, None], first, count, context, 0, out, shared_k=shared, scale=0.4)
    for at, number, length, start in ((0, 7, 19, 0), (7, 30, 30, 19)):
        own = slice(start, start + length)
        keys = torch.cat([k[own], shared[own, None].expand(-1, H, -1)], dim=2).float()
        score = torch.einsum("thd,chd->htc", q_THd[at : at + number].float(), keys) * 0.4
        later = torch.ones((number, length), dtype=torch.bool, device=DEVICE).triu(length - number + 1)
        score.masked_fill_(later, -torch.inf)
        want = torch.einsum("htc,chv->thv", score.softmax(-1), v[own].float())
        got = out[at : at + number].float()
        assert float((got - want).abs().max()) <= TOLERANCE[dtype] * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sinks", "all"])
def test_contexts_that_are_laid_end_to_end_first(name, dtype, monkeypatch):
    """One may hold what is no number, and does not spoil the next."""
    seen = []
    monkeypatch.setattr(prefill, "FEWEST", 1)
    monkeypatch.setattr(prefill, "gathers", lambda *given, real=prefill.gathers: seen.append(real(*given)) or seen[-1])
    check((4, 2, 32), 16, dtype, SIGHTS.get(name, PLAIN))
    assert seen == [True]


def test_rows_of_nobody_stay():
    batch, num_blocks = step(SPANS, 16, "triton")
    assert batch.prompts is not None
    keys, values = draw(2, num_blocks * 16, 1, 16, dtype=torch.float32).unbind()
    q_THd = draw(50, 2, 16, dtype=torch.float32)
    out = torch.full_like(q_THd, 7.0)
    spans = batch.prompts.first_P + 4, batch.prompts.count_P, batch.prompts.context_P
    prefill.prefill(q_THd, keys, values, batch.prompts.block_PN, *spans, 16, out)
    assert (out[:5] == 7).all()
    assert (out[5:45] != 7).all()
    assert (out[45:] == 7).all()


def test_more_heads_than_a_tile_has_rows_are_refused():
    q_THd = draw(4, 32, 16, dtype=torch.float32)
    keys = draw(16, 1, 16, dtype=torch.float32)
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="32 heads a KV head do not fit the 16 rows of a tile"):
        prefill.prefill(
            q_THd, keys, keys, one[:, None], one, one, one, 16, torch.empty_like(q_THd), tile=Tile(16, 16, 4, 2)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rule_fits_its_shape(dtype, monkeypatch):
    monkeypatch.undo()
    for d in (16, 64, 96, 128, 192, 256):
        for group in (1, 5, 8, 64, 128):
            for rows, seen, boxes in (
                (group, 9999, False),
                (1 << 20, 9999, False),
                (group, 128, True),
                (group, 999, True),
            ):
                tile = prefill.choose(d, min(d, 128), dtype, group, rows, seen, boxes)
                assert max(16, group) <= tile.BM
                assert tile.BN >= 16
                assert not boxes or prefill.BOX % tile.BN == 0


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_in_a_graph_that_is_replayed():
    """Nothing is read on the host: the same graph serves other lengths."""
    batch, num_blocks = step([(30, 70), (0, 50)], 16, "triton")
    prompts = batch.prompts
    assert prompts is not None
    keys, values = draw(2, num_blocks * 16, 2, 64, dtype=torch.bfloat16).unbind()
    q_THd = draw(120, 8, 64, dtype=torch.bfloat16)
    attend(q_THd, (keys, values), batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q_THd, (keys, values), batch)
    for change in (0, 13, 20):
        prompts.context_P.sub_(change)
        prompts.count_P.sub_(change)
        out.zero_()
        graph.replay()
        want = attend(q_THd, (keys, values), batch)
        for first, count in zip(prompts.first_P.tolist(), prompts.count_P.tolist(), strict=True):
            assert torch.equal(out[first : first + count], want[first : first + count])
            assert not out[first : first + count].eq(0).all()
