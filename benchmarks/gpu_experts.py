"""How long the expert layer of one rank takes on a GPU: grouping, both products, activation and the weighted sum, in a
CUDA graph, experts in allocations of their own, random routing.

Beside each time: its ratio to the floor (the larger of the bytes of used experts over the copy bandwidth and the
operations over the rate of a product of 8192^3, both measured in this run), the peers run here, and what was recorded
of vLLM 0.24 on an H100. Run: python benchmarks/gpu_experts.py [--shapes qwen3-bf16 ...] [--tokens N ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from _gpu import in_graph, need_gpus
from torch import Tensor

from nonet import plugins
from nonet.errors import NonetError
from nonet.kernels.fp8 import FP8, quantize
from nonet.moe.base import Experts, group_by_slot
from nonet.testing.expert_layers import SHAPES, Given, Shape, routed
from nonet.weights.slots import BlockScales, SlotWeights

DEVICE, BLOCK, CALLS, FEW, CHECKED = "cuda", 128, 4, 4096, 16
BACKENDS = ("triton", "deepgemm")
ARRIVED = "triton with rows in FP8"
Found = tuple[str, Experts, SlotWeights]
Layer = Callable[[Given], Tensor]


_VLLM = {"qwen3-bf16": (39, 181, 364, 416, 448, 528, 886, 1608), "qwen3-fp8": (37, 118, 209, 236, 268, 347, 873, 1663)}
RECORDED = {name: dict(zip(SHAPES[name].tokens, us, strict=True)) for name, us in _VLLM.items()}  # vLLM 0.24.0


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: bytes a second that an elementwise kernel reads and writes, operations a second."""

    copy: float
    bf16: float
    fp8: float


@dataclass(frozen=True)
class Result:
    """Of one number of tokens; microseconds."""

    shape: str
    tokens: int
    rows: int
    pairs: float
    used: float  # experts that got a row
    floor: float
    recorded: float | None
    by_backend: dict[str, float]
    error: dict[str, float]  # relative, of the first rows, against float32 and dequantised weights
    parts: dict[str, float]  # of triton
    tflops: float  # of triton


def ceilings() -> Ceilings:
    a, b = (torch.randn((8192, 8192), device=DEVICE).bfloat16() for _ in range(2))
    a8, b8 = a.to(FP8), b.to(FP8).t()
    one, source = torch.ones((), device=DEVICE), torch.zeros(1 << 28, device=DEVICE)
    to = torch.empty_like(source)
    flops = 2 * 8192**3
    return Ceilings(
        copy=2 * source.nbytes / in_graph([lambda: torch.neg(source, out=to)] * CALLS) * 1e6,
        bf16=flops / in_graph([lambda: a @ b] * CALLS) * 1e6,
        fp8=flops / in_graph([lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)] * CALLS) * 1e6,
    )


def weights_of(shape: Shape) -> SlotWeights:
    """Random, each slot's in allocations of its own, in no order."""
    gate_up, down, gate_up_scale, down_scale = ([torch.empty(0)] * shape.slots for _ in range(4))
    for s in torch.randperm(shape.slots).tolist():
        both = torch.randn((2 * shape.width, shape.hidden), device=DEVICE) * shape.hidden**-0.5
        back = torch.randn((shape.hidden, shape.width), device=DEVICE) * shape.width**-0.5
        if shape.fp8:
            gate_up[s], scale = quantize(both, BLOCK)  # the width is a multiple of the block
            gate_up_scale[s] = scale.view(2, -1, scale.shape[1])
            down[s], down_scale[s] = quantize(back, BLOCK)
        else:
            gate_up[s], down[s] = both.bfloat16(), back.bfloat16()
    scales = BlockScales(tuple(gate_up_scale), tuple(down_scale), BLOCK) if shape.fp8 else None
    return SlotWeights(tuple(gate_up), tuple(down), scales=scales)


def adjoining(weights: SlotWeights) -> SlotWeights:
    """A copy whose slots are parts of two tensors: what the libraries want."""
    copy = SlotWeights.adjoining(torch.stack(weights.gate_up), torch.stack(weights.down))
    if weights.scales is None:
        return copy
    scales = torch.stack(weights.scales.gate_up), torch.stack(weights.scales.down)
    return replace(copy, scales=BlockScales(scales[0].unbind(), scales[1].unbind(), BLOCK))


def backends(weights: SlotWeights, copy: SlotWeights) -> Iterator[Found]:
    """(name, kernel, the slots it is given) of those that are installed and do such weights."""
    for name in BACKENDS:
        own = weights if name == "triton" else copy
        try:
            kernel = plugins.load("nonet.moe.experts", name, "expert_backend").create()
            kernel.check(own)
        except NonetError as error:
            print(f"# not measured: {error}", flush=True)
            continue
        yield name, kernel, own


def grouped_mm(x_ND: Tensor, slot_NK: Tensor, weight_NK: Tensor, stacked: tuple[Tensor, Tensor]) -> Tensor:
    """What PyTorch has: sort, grouped product, activation, grouped product, weighted sum."""
    N, K = slot_NK.shape
    slot_P, ids_S = slot_NK.reshape(-1), torch.arange(len(stacked[0]), device=slot_NK.device)
    sorted_P, order = slot_P.sort(stable=True)
    ends = torch.searchsorted(sorted_P, ids_S, right=True).int()  # bincount would synchronise with the host
    both = torch._grouped_mm(x_ND[order // K], stacked[0].transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, 1)
    y_MD = torch._grouped_mm(F.silu(gate) * up, stacked[1].transpose(1, 2), offs=ends)
    y_NKD = torch.empty_like(y_MD).index_copy_(0, order, y_MD).view(N, K, -1)
    return torch.bmm(weight_NK.to(y_NKD.dtype).unsqueeze(1), y_NKD).squeeze(1)


def of_fp8_rows(inputs: list[Given], shape: Shape, kernel: Experts, own: SlotWeights) -> Layer:
    """The same layer where rows come in FP8, as all-to-alls send them: by the sender, outside of what is timed."""
    from nonet.kernels.triton import experts_fp8

    eights = [experts_fp8.quantize_rows(x_ND) for x_ND, _, _ in inputs]
    of = {id(given): eight for given, eight in zip(inputs, eights, strict=True)}

    def layer(given: Given) -> Tensor:
        x_ND, scale_Nd = of[id(given)]
        return kernel(replace(group_by_slot(x_ND, *given[1:], shape.slots, None), scale_Nd=scale_Nd), own, "rows")

    return layer


def expected(x_ND: Tensor, slot_NK: Tensor, weight_NK: Tensor, weights: SlotWeights) -> Tensor:
    """Of the first rows, in float32."""
    out = torch.zeros_like(x_ND, dtype=torch.float32)
    for row, slots in enumerate(slot_NK.tolist()):
        for k, slot in enumerate(slots):
            if slot >= 0:
                gate_up, down = (part.float() for part in weights.matrices(slot, torch.float32))
                gate, up = (gate_up @ x_ND[row].float()).chunk(2)
                out[row] += weight_NK[row, k] * (down @ (F.silu(gate) * up))
    return out


def parts_of(shape: Shape, inputs: list[Given]) -> dict[str, float]:
    """Microseconds of grouping, of quantising rows and of the weighted sum; what is left are the products."""
    from nonet.kernels.triton import experts, experts_fp8

    sent = [group_by_slot(*given, shape.slots, None) for given in inputs]
    y_MD = torch.zeros((max(len(s.row_M) for s in sent), shape.hidden), dtype=torch.bfloat16, device=DEVICE)
    parts = {
        "group": in_graph([lambda g=given: group_by_slot(*g, shape.slots, None) for given in inputs]),
        "sum": in_graph([lambda s=s: experts.sum_pairs(y_MD, s.pair_NK, s.weight_M) for s in sent]),
    }
    if shape.fp8:
        parts["quantize"] = in_graph([lambda s=s: experts_fp8.quantize_rows(s.x_ND) for s in sent])
    return parts


def measure(name: str, tokens: int, found: list[Found], stacked: tuple[Tensor, Tensor] | None, top: Ceilings) -> Result:
    """Calls of one graph have different routings while experts' weights could stay in the cache."""
    torch.manual_seed(tokens)
    shape, weights = SHAPES[name], found[0][2]
    inputs = [routed(shape, tokens, DEVICE) for _ in range(CALLS if tokens < FEW else 1)]
    counts = [group_by_slot(*given, shape.slots, None).count_S for given in inputs]
    pairs = statistics.mean(int(count_S.sum()) for count_S in counts)
    used = statistics.mean(int((count_S > 0).sum()) for count_S in counts)
    want = expected(*(part[:CHECKED] for part in inputs[0]), weights)

    layers: dict[str, Layer] = {
        backend: lambda given, kernel=kernel, own=own: kernel(group_by_slot(*given, shape.slots, None), own, "rows")
        for backend, kernel, own in found
    }
    if shape.fp8:
        layers[ARRIVED] = of_fp8_rows(inputs, shape, found[0][1], weights)
    if stacked is not None and not shape.fp8 and shape.slots == shape.experts:
        layers["grouped_mm"] = lambda given: grouped_mm(*given, stacked)
    times, errors = {}, {}
    for backend, layer in layers.items():
        errors[backend] = float((layer(inputs[0])[:CHECKED].float() - want).norm() / want.norm())
        times[backend] = in_graph([lambda g=given, layer=layer: layer(g) for given in inputs])
    per_expert, rate = 3 * shape.hidden * shape.width, top.fp8 if shape.fp8 else top.bf16
    floor = max(used * per_expert * (1 if shape.fp8 else 2) / top.copy, 2 * per_expert * pairs / rate) * 1e6
    tflops = 2 * per_expert * pairs / times["triton"] / 1e6
    rows, recorded = len(inputs[0][0]), RECORDED.get(name, {}).get(tokens)
    return Result(name, tokens, rows, pairs, used, floor, recorded, times, errors, parts_of(shape, inputs), tflops)


def show(result: Result) -> None:
    us = result.by_backend["triton"]
    peers = " ".join(f"{n} {t:,.1f} ({t / us:.2f}x)" for n, t in result.by_backend.items() if n != "triton")
    recorded = f"{result.recorded:,.0f} ({result.recorded / us:.2f}x)" if result.recorded else "-"
    print(
        f"{result.tokens:>7} {result.pairs:>7.0f} {result.used:>5.0f} {us:>9,.1f} {result.floor:>9,.1f} "
        f"{us / result.floor:>6.2f} {result.tflops:>7,.0f} {recorded:>14} {result.error['triton']:>9.1e} "
        f"{result.parts['group']:>6.1f} {result.parts['sum']:>6.1f} {result.parts.get('quantize', 0):>6.1f}  {peers}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of each shape's own")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    need_gpus()
    import triton

    torch.manual_seed(0)
    machine = torch.cuda.get_device_name()
    top = ceilings()
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}; medians of graph replays")
    print(f"copy {top.copy / 1e12:.2f} TB/s; 8192^3: {top.bf16 / 1e12:,.0f} bf16, {top.fp8 / 1e12:,.0f} fp8 TFLOP/s")
    results = []
    for name in args.shapes:
        shape = SHAPES[name]
        weights = weights_of(shape)
        print(f"\n{name}: {shape.slots} of {shape.experts} experts, {shape.hidden} x {shape.width}, top-{shape.top_k}")
        copy = adjoining(weights)
        found = list(backends(weights, copy))
        print(
            f"{'tokens':>7} {'pairs':>7} {'used':>5} {'triton us':>9} {'floor us':>9} {'ratio':>6} {'TFLOP/s':>7} "
            f"{'recorded vLLM':>14} {'error':>9} {'group':>6} {'sum':>6} {'quant':>6}  peers, us (times triton's)"
        )
        for tokens in args.tokens or shape.tokens:
            results.append(measure(name, tokens, found, copy.stacked, top))
            show(results[-1])
        del weights, copy, found
        torch.cuda.empty_cache()
    if args.json:
        about = {"device": machine, "torch": torch.__version__, "triton": triton.__version__, "ceilings": asdict(top)}
        args.json.write_text(json.dumps({**about, "results": [asdict(result) for result in results]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
