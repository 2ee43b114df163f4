"""Triton's grouping and expert kernels against their plain forms: on a GPU, or on CPU tensors in its interpreter.

Run by test_triton.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nonet.kernels.fp8 import FP8
from nonet.kernels.triton import INTERPRETED, experts, grouping
from nonet.kernels.triton.tiling import Tile
from nonet.moe.base import Dispatched, group_by_slot_reference, sum_pairs
from nonet.moe.experts import reference
from nonet.moe.experts.triton import TritonExperts, tiles
from nonet.weights.slots import SlotWeights

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the largest value


def grouped(N: int, K: int, S: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slot_NK = torch.randint(-1, S + 1, (N, K), generator=generator)
    return slot_NK.to(DEVICE), torch.rand((N, K), generator=generator).to(DEVICE)


SHAPES = [(0, 2, 3), (1, 8, 16), (5, 3, 7), (1, 1, 1), (16, 1, 5), (9, 2, 0), (100, 4, 6), (200, 4, 6), (2200, 2, 3)]
LARGE = [] if INTERPRETED else [(3000, 8, 128), (8192, 8, 256), (70_000, 1, 3)]


@pytest.mark.parametrize(("N", "K", "S"), SHAPES + LARGE)
def test_grouping(N, K, S):
    slot_NK, weight_NK = grouped(N, K, S)
    want = group_by_slot_reference(torch.zeros(N, 1, device=DEVICE), slot_NK, weight_NK, S, None)
    row, weight, pair, start, count = grouping.group(slot_NK, weight_NK, S)
    total = int(count.sum())
    assert torch.equal(count, want.count_S)
    assert torch.equal(start, want.start_S)
    assert torch.equal(pair, want.pair_NK)
    assert torch.equal(row[:total], want.row_M[:total])
    assert torch.equal(weight[:total], want.weight_M[:total])


def problem(N: int, K: int, S: int, D: int, width: int, dtype: torch.dtype) -> tuple[SlotWeights, Dispatched]:
    """Slots that do not adjoin, and rows for them; what is past the pairs is NaN."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DEVICE, dtype)

    own = SlotWeights(tuple(draw(2 * width, D) for _ in range(S)), tuple(draw(D, width) for _ in range(S)))
    slot_NK, weight_NK = grouped(N, K, S)
    given = Dispatched(draw(N, D), *grouping.group(slot_NK, weight_NK, S), None)
    given.weight_M[int(given.count_S.sum()) :] = torch.nan
    return own, given


def formula(own: SlotWeights, given: Dispatched) -> torch.Tensor:
    """[pairs, D] in float32 or more."""
    out = []
    for slot, (start, count) in enumerate(zip(given.start_S.tolist(), given.count_S.tolist(), strict=True)):
        x_CD = given.x_ND[given.row_M[start : start + count]].double()
        gate, up = (x_CD @ own.gate_up[slot].double().t()).chunk(2, dim=1)
        out.append((F.silu(gate) * up) @ own.down[slot].double().t())
    return torch.cat(out).float()


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert float((got.float() - want.float()).abs().max()) <= TOLERANCE[dtype] * float(want.abs().max())


TILES = [Tile(16, 16, 16, 4, 2, True), Tile(16, 32, 16, 4, 2, False), Tile(32, 16, 32, 4, 3, True)]
LOOPS = [Tile(16, 16, 16, 4, 2, True, 1), Tile(16, 32, 32, 4, 2, False, 2)]  # programs that take several jobs
HALVES = [Tile(128, 32, 32, 8, 2, False, 0, True), Tile(128, 32, 16, 8, 2, False, 1, True)]
SIZES = [(11, 2, 4, 32, 32), (9, 3, 5, 40, 24), (40, 1, 2, 48, 16)]
RUNS = [(*size, tile) for size in SIZES for tile in TILES] + [(*SIZES[0], tile) for tile in LOOPS]
RUNS += [(90, 2, 2, 32, 32, tile) for tile in HALVES]  # one slot has more than 64 pairs, one fewer
RUNS += [(700, 1, 2, 48, 80, TILES[1])]  # more blocks than take turns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "S", "D", "width", "tile"), RUNS)
def test_two_products(N, K, S, D, width, tile, dtype):
    own, given = problem(N, K, S, D, width, dtype)
    tables = [torch.tensor([w.data_ptr() for w in part], device=DEVICE) for part in (own.gate_up, own.down)]
    where = given.start_S, given.count_S
    act = experts.gate_up(given.x_ND, given.row_M, *where, tables[0], width, tile)
    total = int(given.count_S.sum())
    act[total:] = torch.nan  # undefined
    y_MD = experts.down(act, *where, tables[1], D, tile)
    near(y_MD[:total], formula(own, given), dtype)
    y_MD[total:] = torch.nan
    near(experts.sum_pairs(y_MD, given.pair_NK, given.weight_M), sum_pairs(y_MD, given), dtype)


@pytest.mark.parametrize("N", [0, 1, 7, 60] + ([] if INTERPRETED else [300, 2000]))
def test_the_backend_chooses_tiles_for_any_number_of_rows(N):
    D, width, dtype = (32, 16, torch.float32) if INTERPRETED else (256, 192, torch.bfloat16)
    own, given = problem(N, 2, 4, D, width, dtype)
    kernel = TritonExperts()
    total = int(given.count_S.sum())
    y_MD = kernel(given, own, "pairs")
    near(y_MD[:total], formula(own, given)[:total], dtype)
    near(kernel(given, own, "rows"), sum_pairs(y_MD, given), dtype)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_biases_and_the_other_activation(activation, swap, monkeypatch):
    """As gpt-oss has them; the biases of adjoining slots begin anywhere."""
    own, given = problem(11, 2, 4, 32, 24, torch.float32)
    draw = torch.Generator().manual_seed(2)
    gate_up_bias, down_bias = (torch.randn((4, n), generator=draw).to(DEVICE) * 4 for n in (48, 33))
    own = replace(own, gate_up_bias=gate_up_bias.unbind(), down_bias=tuple(b[1:] for b in down_bias.unbind()))
    own = replace(own, activation=activation)
    tile = Tile(16, 16, 16, 4, 2, swap)
    monkeypatch.setattr("nonet.moe.experts.triton.tiles", lambda pairs, dtype: (tile, tile))
    total = int(given.count_S.sum())
    near(TritonExperts()(given, own, "pairs")[:total], reference.create()(given, own, "pairs")[:total], torch.float32)


def test_every_rule_fits_its_shape():
    for pairs in (0.1, 1, 5, 20, 60, 300):
        for dtype in (torch.bfloat16, torch.float32, FP8):
            for tile in tiles(pairs, dtype):
                assert tile.BM >= 16
                assert min(tile.BN, tile.BK) >= 16


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_all_of_it_in_a_graph_that_is_replayed():
    """Nothing is read on the host: the same graph serves other rows and other routing."""
    own, given = problem(64, 4, 8, 128, 64, torch.bfloat16)
    slot_NK, weight_NK = grouped(64, 4, 8)
    x_ND, kernel = given.x_ND, TritonExperts()

    def layer() -> torch.Tensor:
        return kernel(Dispatched(x_ND, *grouping.group(slot_NK, weight_NK, 8), None), own, "rows")

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in (3, 4, 5):
        slot_NK.copy_(grouped(64, 4, 8, seed)[0])
        x_ND.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer())
