"""Small operations in Triton against their plain forms: on a GPU, or on CPU tensors in Triton's interpreter.

Run by test_small.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nonet.config.fleet import Fleet
from nonet.engine.sampler import Sampler, _key, settings
from nonet.engine.sampler import draw as draw_one
from nonet.eplb.placement import Placement
from nonet.kernels.cpu.noise import exponential
from nonet.kernels.triton import INTERPRETED, activation, lookup, norm, rope, routing, sampling
from nonet.layers.attention import place_qkv
from nonet.layers.mlp import silu_times_reference
from nonet.layers.norm import rms_norm_reference
from nonet.layers.rope import Rope, rotate
from nonet.moe.lookup import Even
from nonet.moe.router import Groups, scored_topk_reference, softmax_topk_reference
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams

# infinities and NaN are meant; the interpreter's NumPy warns of them
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16] + ([] if INTERPRETED else [torch.float16])
# of half precision: kernels round once, the plain form after each operation
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(0, 8), (1, 1), (3, 7), (5, 512), (2, 2880)])
def test_norm(N, D, dtype):
    x, y, weight = (draw(n, D, dtype=dtype, seed=s) for n, s in ((N, 1), (N, 2), (1, 3)))
    near(norm.rms_norm(x, weight[0], 1e-3), rms_norm_reference(x, weight[0], 1e-3), dtype)
    total, normed = norm.add_rms_norm(x, y, weight[0], 1e-3)
    near(total, x + y, dtype)
    assert INTERPRETED or torch.equal(total, x + y)  # the interpreter cuts bfloat16 off instead of rounding it
    near(normed, rms_norm_reference(x + y, weight[0], 1e-3), dtype)


def test_rows_to_be_normed_may_lie_apart():
    wide, weight = draw(6, 40), draw(24)
    wide[:, 24:] = torch.nan
    near(norm.rms_norm(wide[:, :24], weight, 1e-6), rms_norm_reference(wide[:, :24], weight, 1e-6), torch.float32)
    x = draw(24, 6).t()
    near(norm.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), torch.float32)
    for part in norm.add_rms_norm(x, x, weight, 1e-6):
        assert part.is_contiguous()
    near(norm.add_rms_norm(x, draw(6, 24), weight, 1e-6)[0], x + draw(6, 24), torch.float32)
    heads = draw(2, 3, 24)
    near(norm.rms_norm(heads, weight, 1e-6), rms_norm_reference(heads, weight, 1e-6), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("T", "H", "h", "d"), [(0, 4, 2, 8), (1, 1, 1, 2), (5, 6, 2, 10), (9, 7, 1, 16), (3, 8, 8, 64)]
)
def test_placing_q_k_and_v(T, H, h, d, normed, dtype):
    qkv = draw(T, H + 2 * h, d, dtype=dtype)
    cos_sin = Rope(d, 1e4, 256, dtype, DEVICE).at(torch.arange(T, device=DEVICE) * 3)
    weights = (draw(H + h, d, dtype=dtype, seed=1), 1e-5) if normed else None
    place_T = torch.randperm(T + 4, generator=torch.Generator().manual_seed(2))[:T].to(DEVICE)
    theirs, ours = (
        tuple(torch.full((T + 4, h, d), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)) for _ in range(2)
    )
    want = place_qkv(qkv, weights, cos_sin, theirs, place_T, H)
    near(rope.place_qkv(qkv, weights, cos_sin, ours, place_T, H), want, dtype)
    for got, wanted in zip(ours, theirs, strict=True):
        near(got, wanted, dtype)
    assert torch.equal(ours[1], theirs[1])  # values are only moved


def placed_latent(
    q: torch.Tensor, row: torch.Tensor, norm: tuple[torch.Tensor, float], cos_sin: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, cached rows), by the plain functions."""
    c = len(norm[0])
    r = row.shape[1] - c
    q = torch.cat([q[..., :-r], rotate(q[..., -r:], *cos_sin)], dim=-1)
    k_Tr = rotate(row[:, None, c:], *cos_sin).squeeze(1)
    return q, torch.cat([rms_norm_reference(row[:, :c], *norm), k_Tr], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "n", "c", "r"), [(0, 1, 8, 8, 4), (1, 1, 3, 5, 2), (4, 40, 8, 24, 10)])
def test_placing_latent_rows(T, H, n, c, r, dtype):
    both, cache = draw(T, H * (n + r) + c + r, dtype=dtype), torch.full((T + 4, 1, c + r), 7.0, device=DEVICE).to(dtype)
    q_THx, row_TW = both[:, : H * (n + r)].view(T, H, n + r), both[:, H * (n + r) :]
    norm_c, place_T = (draw(c, dtype=dtype, seed=1), 1e-6), torch.arange(T, device=DEVICE) + 2
    cos_sin = Rope(r, 1e4, 256, dtype, DEVICE).at(torch.arange(T, device=DEVICE) * 3)
    want, want_row = placed_latent(q_THx, row_TW, norm_c, cos_sin)
    if T > 1:
        place_T[-1] = -1
    rope.place_latent(q_THx, row_TW, norm_c, cos_sin, cache, place_T)
    near(q_THx, want, dtype)
    kept = place_T[place_T >= 0]
    near(cache[kept, 0], want_row[: len(kept)], dtype)
    cache[kept] = 7.0
    assert (cache == 7.0).all()


def test_what_has_no_place_is_not_written():
    cache = tuple(torch.full((4, 1, 8), torch.nan, device=DEVICE) for _ in range(2))
    place_T = torch.tensor([2, -1], device=DEVICE)
    cos_sin = Rope(8, 1e4, 16, torch.float32, DEVICE).at(torch.arange(2, device=DEVICE))
    q_THd = rope.place_qkv(draw(2, 4, 8), None, cos_sin, cache, place_T, 2)
    assert q_THd.isfinite().all()
    for part in cache:
        assert part.isfinite().all(dim=(1, 2)).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "width"), [(0, 4), (1, 1), (3, 30), (2, 1500)])
def test_silu_times(T, width, dtype):
    gate_up = draw(T, 2 * width, dtype=dtype) * 4
    near(activation.silu_times(gate_up), silu_times_reference(gate_up), dtype)


def test_silu_of_very_low_numbers_is_zero():
    assert activation.silu_times(torch.tensor([[-1e4, -100.0, 2.0, 2.0]], device=DEVICE)).tolist() == [[0.0, 0.0]]


# -- routing ----------------------------------------------------------------------------------------------------------


def dense(expert_TK: torch.Tensor, weight_TK: torch.Tensor, E: int) -> torch.Tensor:
    assert expert_TK.dtype == torch.int64
    assert weight_TK.dtype == torch.float32
    return torch.zeros(len(expert_TK), E, device=DEVICE).scatter_(1, expert_TK, weight_TK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (9, 24, 6), (5, 128, 8), (3, 8, 8)])
def test_softmax_topk(T, E, K, renormalise, dtype):
    logits = torch.stack(
        [torch.randperm(E, generator=torch.Generator().manual_seed(t)) for t in range(T)] or [torch.empty(E)]
    )
    logits = (logits[:T] / 8).to(DEVICE, dtype)  # no two alike, in any type
    expert_TK, weight_TK = routing.topk(logits, K, renormalise=renormalise)
    want_TK, want_weight_TK = softmax_topk_reference(logits, K, renormalise)
    assert torch.equal(expert_TK, want_TK)
    torch.testing.assert_close(weight_TK, want_weight_TK, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [None, Groups(4, 2, 2), Groups(8, 3, 1), Groups(12, 12, 2), Groups(6, 2, 3)])
def test_scored_topk(groups, biased, scoring):
    E, K = 24, 6
    logits, bias_E = draw(8 if INTERPRETED else 500, E), draw(E, seed=3) * 0.3 if biased else None
    bounds = (1, 1, 1) if groups is None else (groups.count, groups.kept, groups.best)
    for renormalise, scale in ((biased, 2.5), (not biased, 1.0)):
        how = dict(bias_E=bias_E, renormalise=renormalise, scale=scale)
        got = routing.topk(logits, K, sigmoid=scoring == "sigmoid", groups=bounds, **how)
        want = scored_topk_reference(logits, K, scoring, groups=groups, **how)
        torch.testing.assert_close(dense(*got, E), dense(*want, E), atol=1e-5, rtol=1e-5)


def test_deepseek_v3_width():
    logits, bias_E, groups = draw(4, 256), draw(256, seed=1) * 0.1, Groups(8, 4, 2)
    how = dict(bias_E=bias_E, renormalise=True, scale=2.5)
    got = routing.topk(logits, 8, sigmoid=True, groups=(8, 4, 2), **how)
    want = scored_topk_reference(logits, 8, "sigmoid", groups=groups, **how)
    torch.testing.assert_close(dense(*got, 256), dense(*want, 256), atol=1e-5, rtol=1e-5)


def test_of_equal_scores_the_lower_expert_and_group():
    expert_TK, weight_TK = routing.topk(torch.zeros(2, 12, device=DEVICE), 4, renormalise=True)
    assert expert_TK.tolist() == [[0, 1, 2, 3]] * 2
    assert weight_TK.tolist() == [[0.25] * 4] * 2
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]], device=DEVICE)
    expert_TK, _ = routing.topk(logits, 2, sigmoid=True, groups=(3, 2, 1), renormalise=False)
    assert expert_TK.tolist() == [[1, 2]]


@pytest.mark.parametrize("value", [torch.nan, -200.0, torch.inf, -torch.inf])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_experts_stay_experts_whatever_the_logits(value, sigmoid):
    """Rows may be undefined: their experts must still be places in tables."""
    for groups in ((1, 1, 1), (4, 2, 2)):
        logits = torch.full((2, 12), value, device=DEVICE)
        logits[1, 7] = 0.0
        expert_TK, weight_TK = routing.topk(logits, 5, sigmoid=sigmoid, groups=groups, renormalise=True)
        assert ((expert_TK >= 0) & (expert_TK < 12)).all()
        assert all(len(set(row)) == 5 for row in expert_TK.tolist())
        if value == -200.0:
            assert weight_TK.isfinite().all()


# -- lookup -----------------------------------------------------------------------------------------------------------


def even(expert_G: list[int], rank: int) -> Even:
    placement = Placement(np.array([expert_G], dtype=np.int32), Fleet.even(1, len(expert_G)), max(expert_G) + 1)
    return Even(placement, 0, rank, DEVICE)


TOKENS = [(0, 2), (1, 8), (33, 2), (301, 7)] + ([] if INTERPRETED else [(4096, 8), (40_000, 1)])


@pytest.mark.parametrize(("T", "K"), TOKENS)
@pytest.mark.parametrize("expert_G", [[2, 0, 1, 3], [0, 1, 0, 2, 0, 3, 3]])
def test_replicas_in_turn(T, K, expert_G):
    generator = torch.Generator().manual_seed(T)
    expert_TK = (torch.rand((T, K), generator=generator) ** 2 * 4).long().to(DEVICE)
    for rank in (0, 1, 5):
        table = even(expert_G, rank)
        got = lookup.look_up(expert_TK, table.slot_EC, table.count_E, rank)
        assert torch.equal(got, table.reference(expert_TK))


def test_counting_adds():
    index = torch.tensor([[3, 0, 3], [5, -1, 3]], device=DEVICE)
    into = torch.tensor([1, 0, 0, 10, 0, 0, 9], device=DEVICE)
    lookup.count(index, into)
    assert into.tolist() == [2, 0, 0, 13, 0, 1, 9]
    lookup.count(index[:0], into)
    assert into.tolist() == [2, 0, 0, 13, 0, 1, 9]
    index, into = torch.arange(3000, device=DEVICE) % 7, torch.zeros(7, dtype=torch.int64, device=DEVICE)
    lookup.count(index, into)
    assert torch.equal(into, torch.bincount(index))


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "V"), [(0, 5), (1, 1), (3, 700), (2, 9001)])
def test_argmax(B, V, dtype):
    logits = (draw(B, V, dtype=dtype) * 3 - 20).round()  # many are equal, all are negative
    assert torch.equal(sampling.argmax(logits), logits.float().cpu().argmax(dim=-1).to(DEVICE))


def test_argmax_of_what_is_no_number():
    nan, inf = torch.nan, torch.inf
    rows = [[1.0, inf, inf], [-inf, -inf, -inf], [nan, inf, 1.0], [1.0, -nan, nan], [-0.0, 0.0, -1.0]]
    assert sampling.argmax(torch.tensor(rows, device=DEVICE)).tolist() == [1, 0, 0, 1, 0]


def sequence(seed: int, **params: float) -> Sequence:
    return Sequence("0", [1, 2], SamplingParams(**params), max_tokens=9, seed=seed)


SETTINGS = [
    dict(temperature=0.7),
    dict(top_k=3),
    dict(top_k=40, temperature=2.0),
    dict(top_p=0.5),
    dict(top_p=0.9, temperature=1.5),
    dict(min_p=0.3),
    dict(top_p=0.8, top_k=10, min_p=0.05),
    dict(top_p=1e-6),
    dict(top_p=0.999999, top_k=10_000_000),
]


VOCABULARIES = [(1, torch.float32), (150, torch.bfloat16)]
if not INTERPRETED:
    VOCABULARIES += [(V, dtype) for V in (37, 32_000, 151_936) for dtype in DTYPES]


def drawn(logits_BV: torch.Tensor, rows: list[int], sequences: list[Sequence]) -> list[int]:
    noise = [exponential(_key(one), torch.empty(logits_BV.shape[1])) for one in sequences]
    given = torch.tensor(rows), settings(sequences), torch.stack(noise)
    return sampling.draw(logits_BV, *(part.to(DEVICE) for part in given)).tolist()


@pytest.mark.parametrize(("V", "dtype"), VOCABULARIES)
def test_drawing_is_that_of_each_row_alone(V, dtype, monkeypatch):
    """And of the plain form on the CPU: the same seeds draw the same on every device."""
    monkeypatch.setattr(sampling, "DRAWN", (64, 4) if INTERPRETED else sampling.DRAWN)
    logits_BV = draw(2, V, dtype=dtype) * 3
    cases = [(i % 2, sequence(seed, **one)) for seed in (1, 2) for i, one in enumerate(SETTINGS)]
    rows, sequences = (list(part) for part in zip(*cases, strict=True))
    want = [draw_one(logits_BV[b].float().cpu(), one) for b, one in zip(rows, sequences, strict=True)]
    assert drawn(logits_BV, rows, sequences) == want
    assert drawn(logits_BV[1:], [0], sequences[1:2]) == want[1:2]


def test_equal_ones_at_the_border():
    """Of top_k all stay, of top_p the first to reach it."""
    seeds = [sequence(seed, top_k=1) for seed in range(10)]
    assert set(drawn(torch.tensor([[1.0, 1.0, 0.0]], device=DEVICE), [0] * 10, seeds)) == {0, 1}
    seeds = [sequence(seed, top_p=0.5) for seed in range(10)]
    assert set(drawn(torch.zeros((1, 4), device=DEVICE), [0] * 10, seeds)) == {0, 1}
    impossible = torch.tensor([[-1e4, 20.0, -torch.inf, 1e4]], device=DEVICE)
    assert set(drawn(impossible, [0] * 3, [sequence(seed, temperature=2e-5) for seed in range(3)])) == {3}
    assert 2 not in drawn(impossible, [0] * 9, [sequence(seed, temperature=100.0) for seed in range(9)])


@pytest.mark.skipif(INTERPRETED, reason="the sampler asks for a GPU")
def test_the_sampler_mixes_greedy_and_drawn_rows():
    logits = draw(9, 5000).bfloat16()
    each = [sequence(b, temperature=b % 3 / 2, top_p=0.9, presence_penalty=b % 2) for b in range(9)]
    assert Sampler(()).sample(logits, each) == Sampler(()).sample(logits.cpu(), each)


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_all_of_it_in_a_graph_that_is_replayed():
    """Nothing is read on the host: the same graph serves other numbers and other routing."""
    x, y, weight, logits = draw(8, 64), draw(8, 64), draw(64), draw(8, 16)
    table, load = even([*range(16), 3, 5, 3], 1), torch.zeros(16, dtype=torch.int64, device=DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        total, normed = norm.add_rms_norm(x, y, weight, 1e-6)
        expert_TK, weight_TK = routing.topk(logits, 4, renormalise=True)
        lookup.count(expert_TK, load)
        slot_TK = lookup.look_up(expert_TK, table.slot_EC, table.count_E, 1)
        return total, normed, expert_TK, weight_TK, slot_TK, sampling.argmax(normed)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3, 40):
        x.copy_(draw(8, 64, seed=seed))
        logits.copy_(draw(8, 16, seed=seed))
        load.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert int(load.sum()) == 32
        for got, want in zip(out, step(), strict=True):
            assert torch.equal(got, want)
