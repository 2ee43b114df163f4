"""Expert kernels against the plain formula: every kernel of nonet/moe/experts, both kinds of result, odd loads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nonet import plugins
from nonet.moe.base import Dispatched, group_by_slot, sum_pairs
from nonet.weights.slots import SlotWeights

ADAPTERS = {"deepgemm"}  # test_adapters has them
NAMES = [name for name in plugins.names("nonet.moe.experts") if name not in ADAPTERS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_ONLY = {"triton"}  # on CPUs its kernels are tested in Triton's interpreter: tests/kernels/test_triton.py
EACH = [(name, "cpu") for name in NAMES if name not in GPU_ONLY] + [
    pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in NAMES
]
D, WIDTH = 12, 10


def weights(num_slots: int, device: str, dtype: torch.dtype = torch.float32) -> SlotWeights:
    generator = Generator().manual_seed(1)

    def draw(*shape: int) -> tuple[Tensor, ...]:
        return tuple((torch.randn(shape, generator=generator) / 3).to(device, dtype) for _ in range(num_slots))

    return SlotWeights.adjoining(torch.stack(draw(2 * WIDTH, D)), torch.stack(draw(D, WIDTH)))


def apart(own: SlotWeights) -> SlotWeights:
    """The same slots at addresses that do not adjoin."""
    assert own.stacked is not None
    gate_up, down = own.stacked
    return SlotWeights(tuple(w.clone() for w in gate_up), tuple(w.clone() for w in down))


def sent(slots: list[list[int]], num_slots: int, device: str, dtype: torch.dtype = torch.float32) -> Dispatched:
    """Rows with these slots (-1: elsewhere), grouped."""
    generator = Generator().manual_seed(2)
    slot_NK = torch.tensor(slots, dtype=torch.int64).view(len(slots), len(slots[0]) if slots else 2)
    x_ND = torch.randn((len(slots), D), generator=generator)
    weight_NK = torch.rand(slot_NK.shape, generator=generator)
    return group_by_slot(x_ND.to(device, dtype), slot_NK.to(device), weight_NK.to(device), num_slots, None)


def expert(x_D: Tensor, own: SlotWeights, slot: int) -> Tensor:
    """The formula, in float64: down(silu(gate(x)) * up(x))."""
    assert own.stacked is not None
    gate, up = (own.stacked[0][slot].double() @ x_D.double()).chunk(2)
    return own.stacked[1][slot].double() @ (F.silu(gate) * up)


LOADS = {
    "one each": [[0], [1], [2], [3]],
    "empty slots": [[1, 3], [3, 1], [1, 3]],
    "all in one": [[2]] * 9,
    "many": [[i % 4, (i // 2) % 4] for i in range(160)],
    "elsewhere": [[0, -1], [-1, -1], [-1, 3], [1, 2]],
    "repeated": [[1, 1, 1], [0, 1, 1]],
    "none here": [[-1, -1], [-1, -1]],
    "no rows": [],
}


@pytest.mark.parametrize("adjoin", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("takes", ["pairs", "rows"])
@pytest.mark.parametrize(("name", "device"), EACH)
def test_kernel_against_the_formula(name, device, takes, load, adjoin):
    slots = LOADS[load]
    own, given = weights(4, device), sent(slots, 4, device)
    kernel = plugins.load("nonet.moe.experts", name, "expert_backend").create()
    y = kernel(given, own if adjoin else apart(own), takes)
    pair_NK = given.pair_NK.tolist()
    assert y.dtype == torch.float32
    if takes == "rows":
        assert y.shape == (len(slots), D)
    for row, (row_slots, pairs) in enumerate(zip(slots, pair_NK, strict=True)):
        results = {pair: expert(given.x_ND[row], own, s) for s, pair in zip(row_slots, pairs, strict=True) if s >= 0}
        if takes == "pairs":
            for pair, want in results.items():
                torch.testing.assert_close(y[pair].double(), want, rtol=1e-5, atol=1e-6)
        else:
            want = sum((given.weight_M[p].double() * r for p, r in results.items()), torch.zeros(D, device=device))
            torch.testing.assert_close(y[row].double(), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjoin", [True, False])
@pytest.mark.parametrize(("name", "device"), EACH)
def test_kernel_in_bfloat16(name, device, adjoin):
    slots = [[i % 4, (i + 1) % 4] for i in range(40)]
    own, given = weights(4, device, torch.bfloat16), sent(slots, 4, device, torch.bfloat16)
    kernel = plugins.load("nonet.moe.experts", name, "expert_backend").create()
    y_ND = kernel(given, own if adjoin else apart(own), "rows")
    assert y_ND.dtype == torch.bfloat16
    for row, pairs in enumerate(given.pair_NK.tolist()):
        want = sum(
            given.weight_M[p].double() * expert(given.x_ND[row], own, s) for p, s in zip(pairs, slots[row], strict=True)
        )
        torch.testing.assert_close(y_ND[row].double(), want, rtol=0.03, atol=0.01)


def test_reference_bits_do_not_depend_on_the_company():
    """A row's result is the same alone as among others, in whatever slot its expert lies."""
    own = weights(3, "cpu")
    kernel = plugins.load("nonet.moe.experts", "reference", "expert_backend").create()
    many = sent([[0]] * 5 + [[1]] * 30, 3, "cpu")
    y_MD = kernel(many, own, "pairs")
    elsewhere = SlotWeights((own.gate_up[2], own.gate_up[1]), (own.down[2], own.down[1]))
    for row in (5, 17, 34):
        alone = group_by_slot(many.x_ND[row : row + 1], torch.tensor([[1]]), torch.ones(1, 1), 2, None)
        y_1D = kernel(alone, elsewhere, "pairs")
        assert torch.equal(y_1D[0], y_MD[many.pair_NK[row, 0]])


# -- grouping and summing -----------------------------------------------------------------------------------------


def test_group_by_slot_by_hand():
    """Rows (2, 0), (elsewhere, 2), (0, 2): slot 0 has rows 0 and 2, slot 1 none, slot 2 rows 0, 1 and 2."""
    weight_NK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    given = group_by_slot(torch.zeros(3, D), torch.tensor([[2, 0], [7, 2], [0, 2]]), weight_NK, 3, "ticket")
    assert given.count_S.tolist() == [2, 0, 3]
    assert given.start_S.tolist() == [0, 2, 2]
    assert given.row_M[:5].tolist() == [0, 2, 0, 1, 2]
    torch.testing.assert_close(given.weight_M[:5], torch.tensor([0.2, 0.5, 0.1, 0.4, 0.6]))
    assert given.pair_NK.tolist() == [[2, 0], [-1, 3], [1, 4]]
    assert given.ticket == "ticket"


@pytest.mark.parametrize("outside", [-1, -9, 3, 100])
def test_slots_outside_are_elsewhere(outside):
    given = group_by_slot(torch.zeros(1, D), torch.tensor([[1, outside]]), torch.ones(1, 2), 3, None)
    assert given.count_S.tolist() == [0, 1, 0]
    assert given.pair_NK.tolist() == [[0, -1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_pairs_bit_for_bit_in_k_order(num_rows, dtype, device):
    """The sum over k in float32, one after the other; what no pair reads may be NaN."""
    generator = Generator().manual_seed(num_rows)
    slot_NK = torch.randint(-4, 4, (num_rows, 5), generator=generator)
    weight_NK = torch.rand((num_rows, 5), generator=generator)
    given = group_by_slot(torch.zeros(num_rows, D), slot_NK, weight_NK, 4, None)
    total = int(given.count_S.sum())
    y_MD = torch.randn((len(given.row_M), D), generator=generator).to(dtype)
    y_MD[total:] = torch.nan
    given.weight_M[total:] = torch.nan
    want = torch.zeros(num_rows, D)
    for row in range(num_rows):
        for k in range(5):
            if slot_NK[row, k] >= 0:
                want[row] += y_MD[given.pair_NK[row, k]].float() * weight_NK[row, k]
    on = Dispatched(
        *(getattr(given, name).to(device) for name in ("x_ND", "row_M", "weight_M", "pair_NK", "start_S", "count_S")),
        ticket=None,
    )
    assert torch.equal(sum_pairs(y_MD.to(device), on).cpu(), want)
