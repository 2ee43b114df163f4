"""Expert kernels on slots that are not plain: biases, the clamped activation, weights in FP8; against the formula.

`reference` and `grouped` do all of it; another kernel may refuse, with the line that a user sees.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nonet import plugins
from nonet.errors import ConfigError
from nonet.kernels.fp8 import quantize
from nonet.moe.base import Dispatched, Experts, group_by_slot
from nonet.weights.slots import BlockScales, SlotWeights

ADAPTERS = {"deepgemm"}  # test_adapters has them
NAMES = [name for name in plugins.names("nonet.moe.experts") if name not in ADAPTERS]
EACH = [(name, "cpu") for name in NAMES] + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in NAMES]
S, D, WIDTH, BLOCK = 3, 22, 19, 16  # no width is a multiple of the block
KINDS = ["bias", "clamped", "fp8", "bias clamped", "bias clamped fp8"]
LOADS = {"one each": [[0], [1], [2]], "uneven": [[1, 2], [1, -1], [2, 1], [1, 1], [-1, -1]], "no rows": []}


def slots(kind: str, device: str, dtype: torch.dtype) -> tuple[SlotWeights, list[tuple[Tensor, ...]]]:
    """The slots, and what the formula takes of each: gate_up, its bias, down, its bias, in float64."""
    generator = Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn((S, *shape), generator=generator) * 0.6).to(device, dtype)

    gate_up, down = draw(2 * WIDTH, D), draw(D, WIDTH)
    bias, bias_back = draw(2 * WIDTH), draw(D)
    own = SlotWeights.adjoining(gate_up, down)
    if "clamped" in kind:
        own = replace(own, activation="clamped")
    if "bias" in kind:
        own = replace(own, gate_up_bias=bias.unbind(), down_bias=bias_back.unbind())
    else:
        bias, bias_back = torch.zeros_like(bias), torch.zeros_like(bias_back)
    if "fp8" in kind:
        own, gate_up, down = in_fp8(own, dtype)
    return own, [tuple(t.double() for t in own) for own in zip(gate_up, bias, down, bias_back, strict=True)]


def in_fp8(own: SlotWeights, dtype: torch.dtype) -> tuple[SlotWeights, Tensor, Tensor]:
    """The slots in FP8, and what they stand for, number by number."""
    gates = [[quantize(part, BLOCK) for part in w.chunk(2)] for w in own.gate_up]
    backs = [quantize(w, BLOCK) for w in own.down]
    scales = BlockScales(
        tuple(torch.stack([scale for _, scale in both]) for both in gates), tuple(scale for _, scale in backs), BLOCK
    )
    numbers = tuple(torch.cat([n for n, _ in both]) for both in gates), tuple(n for n, _ in backs)
    n, k, i = (torch.arange(size, device=own.down[0].device) // BLOCK for size in (WIDTH, D, D))
    gate_up = [torch.cat([w.float() * s[n][:, k] for w, s in both]) for both in gates]
    down = [w.float() * s[i][:, n] for w, s in backs]
    fp8 = replace(own, gate_up=numbers[0], down=numbers[1], scales=scales, stacked=None)
    return fp8, torch.stack(gate_up).to(dtype), torch.stack(down).to(dtype)


def formula(x_D: Tensor, own: tuple[Tensor, ...], clamped: bool) -> Tensor:
    gate_up, bias, down, bias_back = own
    gate, up = (gate_up @ x_D.double() + bias).chunk(2)
    if not clamped:
        return down @ (F.silu(gate) * up) + bias_back
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return down @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + bias_back


def sent(slots_NK: list[list[int]], device: str, dtype: torch.dtype) -> Dispatched:
    generator = Generator().manual_seed(2)
    slot_NK = torch.tensor(slots_NK, dtype=torch.int64).view(len(slots_NK), len(slots_NK[0]) if slots_NK else 2)
    x_ND = torch.randn((len(slots_NK), D), generator=generator) * 2  # so that some are clamped
    weight_NK = torch.rand(slot_NK.shape, generator=generator)
    return group_by_slot(x_ND.to(device, dtype), slot_NK.to(device), weight_NK.to(device), S, None)


def refuses(kernel: Experts, given: Dispatched, own: SlotWeights) -> bool:
    try:
        kernel(given, own, "rows")
    except ConfigError as refusal:
        return refusal.field == "expert_backend"
    return False


@pytest.mark.parametrize(("name", "device"), EACH)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernel_against_the_formula(name, device, load, kind, dtype, tolerance):
    """Relative error of all results together; no kernel leaves out what it does not know."""
    (own, numbers), given = slots(kind, device, dtype), sent(LOADS[load], device, dtype)
    kernel = plugins.load("nonet.moe.experts", name, "expert_backend").create()
    assert not own.plain
    if name == "triton":  # wants each slot aligned: in an allocation of its own
        own = replace(own, gate_up=tuple(w.clone() for w in own.gate_up), down=tuple(w.clone() for w in own.down))
    if name not in ("reference", "grouped") and refuses(kernel, given, own):
        return
    y_MD, y_ND = kernel(given, own, "pairs"), kernel(given, own, "rows")
    assert y_MD.dtype == y_ND.dtype == dtype
    assert y_ND.shape == (len(LOADS[load]), D)
    wanted_ND = torch.zeros(y_ND.shape, dtype=torch.float64, device=device)
    error = size = 0.0
    for row, pairs in enumerate(given.pair_NK.tolist()):
        for k, pair in enumerate(pairs):
            if pair < 0:
                continue
            want = formula(given.x_ND[row], numbers[LOADS[load][row][k]], "clamped" in kind)
            error += float((y_MD[pair].double() - want).square().sum())
            size += float(want.square().sum())
            wanted_ND[row] += given.weight_M[pair].double() * want
    assert error <= tolerance**2 * size
    assert (y_ND.double() - wanted_ND).norm() <= tolerance * wanted_ND.norm()


def test_the_clamp_is_reached():
    """Else the test above would not see it."""
    _, numbers = slots("clamped", "cpu", torch.float32)
    x_ND = sent(LOADS["uneven"], "cpu", torch.float32).x_ND
    both = torch.stack([gate_up @ x_D.double() for (gate_up, *_), x_D in product(numbers, x_ND)])
    gate, up = both.chunk(2, dim=1)
    assert (gate > 7).any()
    assert (up > 7).any()
    assert (up < -7).any()


@pytest.mark.parametrize("kind", KINDS)
def test_reference_bits_do_not_depend_on_the_company(kind):
    own, _ = slots(kind, "cpu", torch.float32)
    kernel = plugins.load("nonet.moe.experts", "reference", "expert_backend").create()
    many = sent([[0]] * 5 + [[1]] * 9, "cpu", torch.float32)
    y_MD = kernel(many, own, "pairs")
    for row in (3, 11):
        slot = torch.tensor([[0 if row < 5 else 1]])
        alone = group_by_slot(many.x_ND[row : row + 1], slot, torch.ones(1, 1), S, None)
        assert torch.equal(kernel(alone, own, "pairs")[0], y_MD[many.pair_NK[row, 0]])
