"""Triton's expert kernels for FP8 against plain PyTorch: on a GPU, or on CPU tensors in Triton's interpreter.

Run by test_triton.py in a process of its own, as triton_cases.py.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nonet.errors import ConfigError
from nonet.kernels import fp8
from nonet.kernels.triton import INTERPRETED, experts_fp8, grouping
from nonet.kernels.triton.tiling import Tile
from nonet.kernels.triton.tuned import Bucket, Layer
from nonet.moe.base import Dispatched, sum_pairs
from nonet.moe.experts.triton import TritonExperts
from nonet.weights.slots import BlockScales, SlotWeights

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter rounds to bfloat16 wrongly
FEW = Tile(16, 128, 128, 4, 3, True), Tile(16, 64, 128, 4, 3, True)
MANY = Tile(128, 128, 128, 8, 3, False, 1), Tile(128, 256, 128, 8, 3, False, 1)
RULES = {
    "few": FEW,
    "medium": (Tile(32, 128, 128, 8, 3, True), Tile(32, 256, 128, 8, 3, True)),
    "medium, rows left": (Tile(64, 128, 128, 4, 2, False), Tile(64, 128, 128, 4, 3, False)),
    "two blocks at once": (Tile(16, 128, 256, 4, 2, True), Tile(32, 128, 256, 4, 2, True)),
    "many": MANY,
    "many, halved": (replace(MANY[0], halve=True), replace(MANY[1], halve=True)),
    "many, a program each": (replace(MANY[0], each=0, halve=True), replace(MANY[1], each=0)),
}


def rows(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3, factors, what they stand for in float32), by the plain form; the last block may be narrower.

    On the CPU: PyTorch's division by 448 is a product with its inverse on GPUs.
    """
    D = x_ND.shape[1]
    eight, scale_Nd = (part.to(DEVICE) for part in fp8.quantize_rows(F.pad(x_ND.cpu(), (0, -D % 128))))
    return eight[:, :D], scale_Nd, fp8.dequantize_rows(eight, scale_Nd, torch.float32)[:, :D]


def problem(N: int, K: int, S: int, D: int, width: int) -> tuple[SlotWeights, Dispatched]:
    """Slots in allocations of their own, and rows for them; what is past the pairs is undefined."""
    draw = torch.Generator().manual_seed(1)
    parts: list[list[Tensor]] = [[], [], [], []]
    for _ in range(S):
        gate, up = (fp8.quantize(torch.randn((width, D), generator=draw) * D**-0.5, 128) for _ in range(2))
        down = fp8.quantize(torch.randn((D, width), generator=draw) * width**-0.5, 128)
        made = torch.cat([gate[0], up[0]]), down[0], torch.stack([gate[1], up[1]]), down[1]
        for part, tensor in zip(parts, made, strict=True):
            part.append(tensor.to(DEVICE))
    gate_up, down, *scales = map(tuple, parts)
    own = SlotWeights(gate_up, down, scales=BlockScales(*scales, 128))
    slot_NK = torch.randint(-1, S + 1, (N, K), generator=draw).to(DEVICE)
    weight_NK = torch.rand((N, K), generator=draw).to(DEVICE)
    x_ND = torch.randn((N, D), generator=draw).to(DEVICE, DTYPE)
    given = Dispatched(x_ND, *grouping.group(slot_NK, weight_NK, S), None)
    given.weight_M[int(given.count_S.sum()) :] = torch.nan
    return own, given


def formula(own: SlotWeights, given: Dispatched, quantized: bool) -> Tensor:
    """[pairs, D] in float32 from dequantised weights; rows and activations as they are, or quantised likewise."""
    x_ND = rows(given.x_ND)[2] if quantized else given.x_ND.float()
    out = []
    for slot, (start, count) in enumerate(zip(given.start_S.tolist(), given.count_S.tolist(), strict=True)):
        gate_up, down = (part.double() for part in own.matrices(slot, torch.float32))
        gate, up = (x_ND[given.row_M[start : start + count]].double() @ gate_up.t()).chunk(2, dim=1)
        act = (F.silu(gate) * up).float()
        out.append((rows(act)[2] if quantized else act).double() @ down.t())
    return torch.cat(out).float()


def off(got: Tensor, want: Tensor) -> float:
    """Relative error of all together."""
    return float((got.float() - want).norm() / want.norm()) if want.numel() else 0.0


def kernel(own: SlotWeights, pair: tuple[Tile, Tile]) -> TritonExperts:
    """With these tiles for any number of pairs."""
    D, width = own.down[0].shape
    return TritonExperts((Layer(len(own.down), D, width, "float8_e4m3fn", (Bucket(1.0, *pair),)),))


@pytest.mark.parametrize(("N", "D"), [(0, 128), (1, 256), (3, 40), (70, 384), (5, 2176)])
def test_rows_are_quantized_as_by_the_plain_form(N, D):
    x_ND = (torch.randn((N, D), generator=torch.Generator().manual_seed(3)) * 8).to(DEVICE, DTYPE)
    x_ND[1:2] = 0
    x_ND[2:3, 7] = 2.0**-20
    eight, scale_Nd = experts_fp8.quantize_rows(x_ND)
    want = rows(x_ND)
    assert torch.equal(eight.float(), want[0].float())
    assert torch.equal(scale_Nd, want[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("N", "K", "S", "D", "width"), [(20, 2, 3, 256, 128), (75, 2, 2, 144, 272)])
def test_layer(N, K, S, D, width, rule):
    own, given = problem(N, K, S, D, width)
    experts, total = kernel(own, RULES[rule]), int(given.count_S.sum())
    y_MD = experts(given, own, "pairs")
    assert y_MD.dtype == DTYPE
    assert off(y_MD[:total], formula(own, given, quantized=True)) < 1e-2  # a last bit off may round to another e4m3
    assert off(y_MD[:total], formula(own, given, quantized=False)) < 6e-2  # what three bits of rows can do
    y_MD[total:] = torch.nan
    assert off(experts(given, own, "rows"), sum_pairs(y_MD, given)) < 1e-2


if INTERPRETED:  # on a GPU what lies behind an allocation may be read without a word

    @pytest.mark.parametrize("D", [128, 272, 384])
    def test_nothing_past_a_weight_is_read(D):
        """An odd number of blocks of outputs, of which the tiles of the second product take two."""
        own, given = problem(75, 2, 2, D, 128)
        want = kernel(own, MANY)(given, own, "pairs")
        assert own.scales is not None
        assert MANY[1].BN == 256
        scales = replace(own.scales, down=tuple(map(before_a_wall, own.scales.down)))
        own = replace(own, down=tuple(map(before_a_wall, own.down)), scales=scales)
        total = int(given.count_S.sum())
        assert torch.equal(kernel(own, MANY)(given, own, "pairs")[:total], want[:total])

    def before_a_wall(matrix: Tensor) -> Tensor:
        """The same numbers at the end of memory: a read past them ends the process."""
        page = mmap.PAGESIZE
        room = -(-matrix.nbytes // page) * page
        memory = mmap.mmap(-1, room + page)
        libc = ctypes.CDLL(None, use_errno=True)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + room), page, mmap.PROT_READ & 0) == 0
        out = whole[room - matrix.nbytes : room].view(matrix.dtype).view(matrix.shape)
        return out.copy_(matrix)


def test_rows_that_arrive_in_fp8_are_taken_as_they_are():
    own, given = problem(20, 2, 3, 256, 128)
    eight, scale_Nd, _ = rows(given.x_ND)
    arrived = replace(given, x_ND=eight.contiguous(), scale_Nd=scale_Nd)
    total = int(given.count_S.sum())
    ours, theirs = kernel(own, FEW)(given, own, "pairs"), kernel(own, FEW)(arrived, own, "pairs")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(ours[:total].bfloat16(), theirs[:total]) or INTERPRETED
    assert off(theirs[:total], ours[:total].float()) < 1e-2


@pytest.mark.parametrize("N", [0, 1, 7, 60])
def test_the_rule_serves_any_number_of_rows(N):
    own, given = problem(N, 2, 3, 128, 128)
    total = int(given.count_S.sum())
    got = TritonExperts(())(given, own, "pairs")[:total]
    assert off(got, formula(own, given, quantized=True)) < 1e-2


def test_what_is_not_done_is_refused():
    own, _ = problem(1, 1, 2, 128, 128)
    assert own.scales is not None
    TritonExperts().check(own)
    bias = tuple(torch.zeros(256) for _ in range(2))
    for bad, says in (
        (replace(own, scales=replace(own.scales, block=64)), "128"),
        (replace(own, scales=replace(own.scales, offset=64)), "128"),
        (replace(own, gate_up_bias=bias, down_bias=bias), "biases"),
        (replace(own, activation="clamped"), "activation"),
        (replace(own, down=tuple(w.t() for w in own.down)), "contiguous"),
        (replace(own, scales=replace(own.scales, down=tuple(f.double() for f in own.scales.down))), "float32"),
    ):
        with pytest.raises(ConfigError, match=says):
            TritonExperts().check(bad)


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
@pytest.mark.parametrize("rule", ["few", "many, halved"])
def test_all_of_it_in_a_graph_that_is_replayed(rule):
    own, given = problem(64, 4, 8, 256, 256)
    slot_NK, weight_NK = (torch.empty((64, 4), dtype=t, device=DEVICE) for t in (torch.int64, torch.float32))
    slot_NK.random_(0, 8)
    weight_NK.fill_(1.0)
    x_ND, experts = given.x_ND, kernel(own, RULES[rule])

    def layer() -> Tensor:
        return experts(Dispatched(x_ND, *grouping.group(slot_NK, weight_NK, 8), None), own, "rows")

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for _ in range(20):
        slot_NK.random_(-1, 9)
        x_ND.normal_()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer())
