"""Every compiled CPU kernel against its plain PyTorch specification, in both types and odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nonet.compiled import drop_stale
from nonet.kernels import cpu
from nonet.kernels.cpu import attention, exchange, experts, norm, routing, rows
from nonet.layers import attention as specified_attention
from nonet.layers.norm import rms_norm_reference
from nonet.layers.rope import Rope
from nonet.moe.base import group_by_slot_reference, sum_pairs
from nonet.moe.experts.reference import Reference
from nonet.moe.router import softmax_topk_reference
from nonet.weights.slots import SlotWeights

DTYPES = [torch.float32, torch.bfloat16]
# of bfloat16: kernels round once, the plain form after each operation
TOLERANCE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), want.float(), **TOLERANCE[dtype])


def test_what_it_takes():
    assert cpu.handles(torch.zeros(1))
    assert cpu.handles(torch.zeros(1, dtype=torch.bfloat16))
    assert not cpu.handles(torch.zeros(1, dtype=torch.float16))
    assert not cpu.handles(torch.zeros(1, dtype=torch.float64))
    assert not cpu.handles(torch.zeros(1, device="meta"))


def test_bfloat16_is_rounded_as_torch_does():
    """To nearest, ties to even; infinities, NaN, zeros of both signs and numbers below the normal ones stay."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -3e-39, 3.4e38, 1.00390625, 1.01171875]
    x = torch.cat([torch.tensor(special), draw(4096, dtype=torch.float32), draw(64, dtype=torch.float32) * 1e30])
    y = torch.zeros(1, len(x), dtype=torch.bfloat16)
    one = torch.ones(1)
    got = rows.sum_pairs(x.unsqueeze(0), torch.zeros(1, 1, dtype=torch.int64), one)
    assert torch.equal(got[0][4:5].isnan(), torch.tensor([True]))
    total, _ = norm.add_rms_norm(x.bfloat16().unsqueeze(0), y, torch.ones(len(x), dtype=torch.bfloat16), 1e-6)
    assert torch.equal(total[0].nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    a, b = draw(1, 4096, dtype=torch.bfloat16, seed=1), draw(1, 4096, dtype=torch.bfloat16, seed=2)
    total, _ = norm.add_rms_norm(a, b, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    assert torch.equal(total, a + b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(0, 8), (1, 1), (3, 7), (17, 512)])
def test_norm(N, D, dtype):
    x, y, weight = (draw(n, D, dtype=dtype, seed=s) for n, s in ((N, 1), (N, 2), (1, 3)))
    near(norm.rms_norm(x, weight[0], 1e-3), rms_norm_reference(x, weight[0], 1e-3), dtype)
    total, normed = norm.add_rms_norm(x, y, weight[0], 1e-3)
    assert torch.equal(total, x + y)
    near(normed, rms_norm_reference(x + y, weight[0], 1e-3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("T", "H", "h", "d"), [(1, 1, 1, 2), (5, 6, 2, 10), (9, 8, 8, 64)])
def test_placing_q_k_and_v(T, H, h, d, normed, dtype):
    qkv = draw(T, H + 2 * h, d, dtype=dtype)
    cos_sin = Rope(d, 1e4, 64, dtype, torch.device("cpu")).at(torch.arange(T) * 3)
    weights = (draw(H + h, d, dtype=dtype, seed=1), 1e-5) if normed else None
    place_T = torch.randperm(T + 4, generator=torch.Generator().manual_seed(2))[:T]
    theirs, ours = (tuple(torch.zeros(T + 4, h, d, dtype=dtype) for _ in range(2)) for _ in range(2))
    want = specified_attention.place_qkv(qkv, weights, cos_sin, theirs, place_T, H)
    near(attention.place_qkv(qkv, weights, cos_sin, ours, place_T, H), want, dtype)
    near(ours[0], theirs[0], dtype)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "h", "d", "C"), [(1, 1, 1, 2, 1), (3, 6, 2, 10, 33), (8, 8, 2, 64, 130)])
def test_decoding(B, H, h, d, C, dtype):
    cache = tuple(draw(B * C * 4, h, d, dtype=dtype, seed=s) for s in (1, 2))
    size = 4
    block_BN = torch.randperm(B * C, generator=torch.Generator().manual_seed(3)).view(B, C)[:, : -(-C // size)]
    length_B = torch.arange(B) % C + 1
    length_B[0] = C
    q = draw(B, H, d, dtype=dtype) * 3
    out = torch.empty_like(q)
    attention.decode(q, cache, block_BN.contiguous(), length_B, size, out)
    near(out, specified_attention.decode(q, cache, block_BN, length_B, size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (7, 5, 5), (33, 130, 8)])
def test_softmax_topk(T, E, K, renormalise, dtype):
    logits = draw(T, E, dtype=dtype) * 4
    expert_TK, weight_TK = routing.softmax_topk(logits, K, renormalise)
    want_TK, want_weight_TK = softmax_topk_reference(logits, K, renormalise)
    torch.testing.assert_close(weight_TK, want_weight_TK, atol=1e-6, rtol=1e-5)
    apart = logits.float().gather(1, want_TK) != logits.float().gather(1, expert_TK)
    assert not apart.any(), "experts differ only where their logits are equal"
    assert all(len(set(row)) == K for row in expert_TK.tolist())


def test_equal_logits_take_the_lower_expert():
    expert_TK, weight_TK = routing.softmax_topk(torch.zeros(2, 6), 3, True)
    assert expert_TK.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weight_TK, torch.full((2, 3), 1 / 3))


def test_counting_and_replicas_in_turn():
    expert_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    count_E = torch.tensor([10, 0, 0])
    routing.count_experts(expert_TK, count_E)
    assert count_E.tolist() == [12, 1, 3]
    slot_EC, replicas_E = torch.tensor([[0, 0], [4, 0], [7, 9]]), torch.tensor([1, 1, 2])
    assert routing.look_up(expert_TK, slot_EC, replicas_E, 0).tolist() == [[0, 7], [9, 4], [7, 0]]
    assert routing.look_up(expert_TK.t().contiguous().t(), slot_EC, replicas_E, 1).tolist() == [[0, 9], [7, 4], [9, 0]]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize(("N", "K", "first", "S"), [(0, 2, 0, 3), (1, 1, 5, 1), (40, 4, 3, 6)])
def test_grouping(N, K, first, S, kind):
    generator = torch.Generator().manual_seed(N)
    slot_NK = torch.randint(-1, 12, (N, K), generator=generator)
    weight_NK = torch.rand(N, 2 * K, generator=generator)[:, K:]
    row_M, weight_M, pair_NK, start_S, count_S = routing.group(slot_NK.to(kind), weight_NK, first, S)
    want = group_by_slot_reference(torch.zeros(N, 1), slot_NK - first, weight_NK, S, None)
    total = int(count_S.sum())
    assert torch.equal(pair_NK, want.pair_NK)
    assert (start_S.tolist(), count_S.tolist()) == (want.start_S.tolist(), want.count_S.tolist())
    assert torch.equal(row_M[:total], want.row_M[:total])
    assert torch.equal(weight_M[:total], want.weight_M[:total])
    assert len(row_M) == len(weight_M) == N * K
    assert ((row_M >= 0) & (row_M < max(N, 1))).all(), "rows past the pairs exist too"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_pairs_ignore_what_no_pair_reads(dtype):
    given = group_by_slot_reference(
        torch.zeros(9, 5), torch.randint(-1, 6, (9, 3), generator=torch.Generator().manual_seed(4)),
        torch.rand(9, 3, generator=torch.Generator().manual_seed(5)), 4, None,
    )  # fmt: skip
    y_MD = draw(27, 5, dtype=dtype)
    y_MD[int(given.count_S.sum()) :] = torch.nan
    got = rows.sum_pairs(y_MD, given.pair_NK, given.weight_M)
    assert got.dtype == dtype
    near(got, sum_pairs(y_MD, given), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_rows_are_moved_bit_by_bit(dtype):
    x_ND = draw(6, 3, dtype=dtype)
    x_ND[0, 0] = torch.nan
    row_M, start_S, count_S = torch.tensor([5, 0, 2]), torch.tensor([0, 2, 2]), torch.tensor([2, 0, 1])
    padded = rows.pad(x_ND, row_M, start_S, count_S, 2)
    zero = torch.zeros(3, dtype=dtype)
    want = torch.stack([x_ND[[5, 0]], torch.stack([zero, zero]), torch.stack([x_ND[2], zero])])
    assert np.array_equal(rows.words(padded), rows.words(want))
    back = torch.zeros(3, 3, dtype=dtype)
    rows.collect(padded.transpose(1, 2).contiguous(), start_S, count_S, back)
    assert np.array_equal(rows.words(back), rows.words(x_ND[row_M]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exchange_between_two_ranks_in_one_process(dtype):
    """Rank 0 of 2 holds slots 0-2, rank 1 slots 3-4. Each sends, receives, answers twice what it got, and pulls."""
    bound_R, K, D = np.array([0, 3, 5]), 2, 3
    x = [torch.zeros(2, 4, D, dtype=dtype) for _ in range(2)]
    note = [torch.full((2, 4, 2 * K), 99, dtype=torch.int32) for _ in range(2)]
    flags, ready = (torch.zeros(2, 2, dtype=torch.int64) for _ in range(2))
    y = [torch.full((8, D), torch.nan, dtype=dtype) for _ in range(2)]
    x_TD = [draw(3, D, dtype=dtype, seed=1), draw(2, D, dtype=dtype, seed=2)]
    slot_TK = [torch.tensor([[0, 3], [-1, -1], [1, 2]]), torch.tensor([[4, 3], [2, 4]])]
    weight_TK = [torch.rand(s.shape) for s in slot_TK]
    sent = []
    for me in range(2):
        to = tuple(exchange.addresses([part[r][me] for r in range(2)]) for part in (x, note))
        to = (*to, exchange.addresses([flags[r, me] for r in range(2)]))
        assert not exchange.arrived(exchange.addresses([flags[r, me] for r in range(2)]), 7)
        sent.append(exchange.send(x_TD[me], slot_TK[me], weight_TK[me], bound_R, to, me, 7))
    assert [[row[:n].tolist() for row, n in zip(*part, strict=True)] for part in sent] == [[[0, 2], [0]], [[1], [0, 1]]]
    for me in range(2):
        mine = exchange.addresses([flags[me, r] for r in range(2)])
        assert exchange.arrived(mine, 7)
        assert not exchange.arrived(mine, 8)
        count_R = exchange.numbers(mine)
        assert count_R.tolist() == [[2, 1], [1, 2]][me]
        got, (row_M, weight_M, pair_NK, start_S, count_S) = exchange.receive(
            x[me], note[me], count_R, int(bound_R[me]), int(bound_R[me + 1] - bound_R[me])
        )
        assert torch.equal(got, [torch.cat([x_TD[0][[0, 2]], x_TD[1][[1]]]), torch.cat([x_TD[0][[0]], x_TD[1]])][me])
        assert count_S.tolist() == [[1, 1, 2], [2, 2]][me]
        assert pair_NK.tolist() == [[[0, -1], [1, 2], [3, -1]], [[-1, 0], [2, 1], [-1, 3]]][me]
        assert row_M[: int(count_S.sum())].tolist() == [[0, 1, 1, 2], [0, 1, 1, 2]][me]
        assert float(weight_M[0]) == float([weight_TK[0][0, 0], weight_TK[0][0, 1]][me])
        exchange.publish(got * 2, y[me], count_R, exchange.addresses([ready[me, r] for r in range(2)]), 7)
    for me in range(2):
        back = exchange.addresses([ready[r, me] for r in range(2)])
        assert exchange.arrived(back, 7)
        pulled = exchange.pull(exchange.addresses(y), exchange.numbers(back), sent[me], x_TD[me])
        times = torch.tensor([[4.0, 0.0, 2.0], [2.0, 4.0]][me]).unsqueeze(1)  # once from each rank that got it
        assert torch.equal(pulled, (x_TD[me].float() * times).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [[[0]], [[2, 0], [2, 1], [2, -1], [0, 2]], [[3, 3]] * 5, [[0, 1], [2, 3]]])
def test_experts_of_few_rows(slots, dtype):
    D, width = 12, 6
    own = SlotWeights.adjoining(
        draw(4, 2 * width, D, dtype=dtype, scale=0.4), draw(4, D, width, dtype=dtype, seed=1, scale=0.4)
    )
    slot_NK = torch.tensor(slots)
    given = group_by_slot_reference(
        draw(len(slots), D, dtype=dtype, seed=2), slot_NK, torch.ones(slot_NK.shape), 4, None
    )
    total = int(given.count_S.sum())
    assert own.stacked is not None
    for pool in (None, ThreadPoolExecutor(1)):
        where = given.row_M, given.start_S, given.count_S
        got = experts.run_experts(given.x_ND, *where, own.stacked, given.count_S.tolist(), pool)
        near(got, Reference()(given, own, "pairs")[:total], dtype)


@pytest.mark.parametrize(
    ("D", "width", "counts"),
    [
        (64, 32, [0, 1, 4, 5, 16, 17, 33, 0, 100]),
        (96, 64, [31, 3]),
        (4096, 32, [150]),  # more rows than are packed at a time
        (40, 32, [20, 1]),  # no multiple of a tile's depth
    ],
)
def test_experts_of_many_rows_between_other_products(D, width, counts):
    """Also that the library's products by the same registers are right before and after."""
    count_S = torch.tensor(counts)
    start_S = count_S.cumsum(0) - count_S
    row_M = torch.arange(sum(counts)) * 7 % 50
    shapes = (len(counts), 2 * width, D), (len(counts), D, width)
    gate_up, down = (draw(*shape, dtype=torch.bfloat16, scale=shape[2] ** -0.5) for shape in shapes)
    x_ND, other = draw(50, D, dtype=torch.bfloat16), draw(64, 64, dtype=torch.bfloat16)
    before = other @ other
    with ThreadPoolExecutor(1) as threads:
        for pool in (None, threads):
            got = experts.run_experts(x_ND, row_M, start_S, count_S, (gate_up, down), counts, pool)
            assert torch.equal(other @ other, before)
            for s, (first, count) in enumerate(zip(start_S.tolist(), counts, strict=True)):
                own = slice(first, first + count)
                gate, up = (x_ND[row_M[own]].float() @ gate_up[s].float().t()).chunk(2, dim=1)
                want = (F.silu(gate) * up).bfloat16().float() @ down[s].float().t()
                near(got[own], want, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (3, 8, 5)])
def test_silu_and_multiply(shape, dtype):
    both = draw(*shape, dtype=dtype) * 8
    gate, up = both.chunk(2, dim=1)
    near(experts.silu_and_multiply(both), F.silu(gate.float()) * up.float(), dtype)


def test_the_exponential_over_its_range():
    """Through the activation: x / (1 + e ** -x) for gates from far below to far above what e ** x can hold."""
    gate = torch.linspace(-200, 200, 4001)
    got = experts.silu_and_multiply(torch.stack([gate, torch.ones_like(gate)], dim=1).reshape(-1, 2))[:, 0]
    torch.testing.assert_close(got.double(), F.silu(gate.double()), atol=1e-30, rtol=3e-7)


@pytest.mark.slow
def test_processors_without_the_bfloat16_instruction(tmp_path):
    """These same tests, compiled for any processor of this kind; takes a while to compile."""
    code = "from nonet.kernels.cpu.dot import HAS_BF16_DOT; assert not HAS_BF16_DOT"
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(pytest_here, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout


def test_without_a_folder_to_keep_them_kernels_are_compiled_each_time():
    code = (
        "import warnings\nfrom numba.core.caching import CacheImpl\nCacheImpl._locator_classes = []\n"
        "with warnings.catch_warnings(record=True) as said:\n    from nonet.kernels.cpu import norm\n"
        "assert {'NUMBA_CACHE_DIR' in str(one.message) for one in said} == {True}\n"
        "import torch; assert norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_was_compiled_before_a_change_is_dropped(tmp_path):
    """Numba looks at a function's own file only, not at those whose functions it calls."""
    (tmp_path / "__pycache__").mkdir()
    source, old, new = tmp_path / "a.py", tmp_path / "__pycache__/old.nbi", tmp_path / "__pycache__/new.nbi"
    for path, when in ((old, 100), (source, 200), (new, 300)):
        path.write_text("")
        os.utime(path, (when, when))
    drop_stale(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.skipif(not experts.tiles.HAS_TILES, reason="needs AMX")
def test_no_width_gives_zeros():
    """A rank's slice of an expert may be empty: nothing is read there."""
    row_M, start_S, count_S = torch.zeros(40, dtype=torch.int64), torch.tensor([0, 20]), torch.tensor([20, 20])
    nothing = torch.zeros(2, 0, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 0, dtype=torch.bfloat16)
    y_MD = experts.run_experts(draw(1, 64, dtype=torch.bfloat16), row_M, start_S, count_S, nothing, [20, 20])
    assert not y_MD.any()
