"""The contract of an all-to-all: one suite that every backend passes, ours and those to come.

`cases(name, size)` are the situations, `check_all2all(world, name, case)` runs one of them on every rank of a
`Cluster`. Each rank rebuilds all ranks' tokens from the seed, so what it should receive and return is known without
communication. Whatever the contract leaves undefined is filled with NaN on the way. Knows no backend's insides.
Legend: see moe/base.py; E experts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nonet import plugins
from nonet.comm.group import Group
from nonet.comm.world import World
from nonet.config.fleet import Fleet, split_evenly
from nonet.eplb.placement import Placement
from nonet.kernels.fp8 import FP8, LARGEST, ROW_BLOCK, dequantize_rows, quantize_rows
from nonet.moe.all2all import local
from nonet.moe.base import All2All, All2AllSpec, Dispatched
from nonet.moe.experts import grouped, reference
from nonet.moe.lookup import Even
from nonet.testing.routing import Imbalanced, Kind, Tokens, tokens
from nonet.weights.slots import SlotWeights

FP8_TOO = frozenset({"nvlink_high_throughput", "nvlink_low_latency"})
ONCE_A_RANK = frozenset({"all2allv", "shm"})  # these send a token only where it is needed; the others show all rows
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}  # of the largest value
_WILD = 2**40  # an index that no one may use


@dataclass(frozen=True)
class Case:
    """One situation: tokens of each rank, pass after pass, and the layer they go through."""

    rows: tuple[tuple[int, ...], ...]
    routing: str | Kind = "uniform"
    num_experts: int = 8
    num_slots: int | None = None  # more than experts: replicas
    top_k: int = 2
    dtype: str = "float32"
    exact: bool = False
    scrambled: bool = False  # slots hold experts in random order
    skew: bool = False  # ranks stop for a moment at random
    hidden_size: int = 32
    intermediate: int = 16
    fp8: bool = False  # rows travel so
    on_grid: bool = False  # rows lose nothing by it
    seed: int = 1


@dataclass(frozen=True)
class Report:
    """What one rank tells the test."""

    calls: int  # collectives entered
    digest: str  # of all results


def cases(name: str, size: int) -> dict[str, Case]:
    """The situations for a backend over `size` ranks, by name."""
    even, uneven = ((6,) * size,), ((7, 0, 3, 1, 5, 0, 2, 9)[:size],)
    last, none = ((*(0,) * (size - 1), 9),), ((0,) * size,)
    several = tuple((count, *(count // 2,) * (size - 1)) for count in (1, 64, 3, 0, 17))
    replicas = Case(even, num_slots=3 * size + 1, num_experts=2 * size)
    out = {
        "even": Case(even),
        "uneven rows": Case(uneven),
        "all but one rank empty": Case(last),
        "no tokens anywhere": Case(none),
        "different sizes in a row": Case(several),
        "top-1": Case(even, top_k=1),
        "every expert": Case(even, top_k=8),
        "odd widths": Case(uneven, hidden_size=33, intermediate=7, dtype="bfloat16", top_k=3),
        "bfloat16": Case(((40,) * size,), dtype="bfloat16", top_k=4),
        "float16": Case(uneven, dtype="float16", top_k=3),
        "22 experts top-5": Case(even, num_experts=22, top_k=5),
        "a rank without slots": Case(even, num_experts=size - 1, top_k=1),
        "hot expert": Case(((20,) * size,), routing="hot_expert"),
        "all to one rank": Case(((33,) * size,), routing="one_rank"),
        "repeated slots": Case(even, routing="repeated", top_k=4),
        "dropped slots": Case(((13,) * size,), routing="dropped", top_k=3),
        "dropped slots bfloat16": Case(uneven, routing="dropped", top_k=3, dtype="bfloat16"),
        "zipf": Case(((30,) * size,), routing="skewed"),
        "imbalance": Case(((30,) * size,), routing=Imbalanced(0.5, 2), num_experts=16),
        "scrambled": Case(uneven, scrambled=True),
        "replicas": replicas,
        "replicas scrambled": replace(replicas, rows=several, scrambled=True, routing="hot_expert"),
        "exact": Case(several, exact=True),
        "exact dropped": Case(uneven, exact=True, routing="dropped", top_k=3),
        "exact repeated": Case(even, exact=True, routing="repeated", top_k=4),
        "exact bfloat16 replicas": replace(replicas, exact=True, dtype="bfloat16", scrambled=True),
        "exact float16": Case(uneven, exact=True, dtype="float16"),
        "exact none": Case(none, exact=True),
    }
    if name in FP8_TOO:
        wide = Case(uneven, hidden_size=256, dtype="bfloat16", top_k=3, fp8=True)
        out |= {"fp8 rounded": wide, "fp8": replace(wide, on_grid=True), "fp8 none": replace(wide, rows=none)}
        out["fp8 dropped"] = replace(wide, on_grid=True, routing="dropped")
    if name == "tensor":  # holds every expert in order, in slices
        return {n: c for n, c in out.items() if not (c.exact or c.scrambled or c.num_slots)}
    return out


def soak(name: str, size: int, passes: int) -> Case:
    """Many passes back to back, all different, with ranks out of step and often without a token."""
    generator = Generator().manual_seed(passes)
    rows = torch.randint(-6, 7, (passes, size), generator=generator).clamp(min=0)
    case = Case(tuple(map(tuple, rows.tolist())), routing="mixed", skew=True)
    return case if name == "tensor" else replace(case, num_slots=10, scrambled=True)


def check_all2all(world: World, name: str, case: Case) -> Report:
    """Run a case through a backend on this rank; raises AssertionError where it breaks the contract."""
    layer = _Layer(world, name, case)
    before = layer.group.calls
    backend: All2All = plugins.load("nonet.moe.all2all", name, "all2all_backend").create(layer.spec)
    digest = hashlib.sha256()
    sleeps = Generator().manual_seed(world.rank)
    for number, rows in enumerate(case.rows):
        if case.skew and torch.rand((), generator=sleeps) < 0.2:
            time.sleep(0.001)
        result = layer.one_pass(backend, number, rows)
        digest.update(result.view(torch.uint8).cpu().numpy().tobytes())
    backend.close()
    return Report(layer.group.calls - before, digest.hexdigest())


class _Layer:
    """The experts of a case, where they live, and what this rank should see."""

    def __init__(self, world: World, name: str, case: Case) -> None:
        self.name, self.case, self.device = name, case, world.device
        self.dtype = getattr(torch, case.dtype)
        self.alone = name == "local"
        self.solo = Group([world.rank], world.rank, world.ep.timeout_s, world.device)
        self.group = self.solo if self.alone else world.ep
        self.placement = self._place(self.group.size)
        self.lookups = [Even(self.placement, 0, rank, world.device) for rank in range(self.group.size)]
        self.spec = All2AllSpec(
            group=self.group,
            fleet=self.placement.fleet,
            top_k=case.top_k,
            hidden_size=case.hidden_size,
            dtype=self.dtype,
            max_rows=max(1, *map(max, case.rows)),
            exact=case.exact,
            fp8=case.fp8,
        )
        self.kernel = reference.create() if case.exact else grouped.create()
        self.weights = self._own_weights()
        self.home = self.placement.experts_on(0, 0)
        self.source = world.rank  # whose tokens are this rank's own

    def _place(self, num_ranks: int) -> Placement:
        case = self.case
        slots = case.num_experts if self.alone or case.num_slots is None else case.num_slots
        order = np.arange(slots, dtype=np.int32) % case.num_experts
        if case.scrambled and not self.alone:
            order = np.random.default_rng(case.seed).permutation(order)
        return Placement(order[None, :], Fleet.even(num_ranks, slots), case.num_experts)

    @cached_property
    def experts(self) -> SlotWeights:
        """Every expert, whole."""
        generator = Generator().manual_seed(self.case.seed)
        E, D, width = self.case.num_experts, self.case.hidden_size, self.case.intermediate

        def draw(*shape: int) -> tuple[Tensor, ...]:
            scale = shape[-1] ** -0.5
            return tuple(
                (torch.randn(shape, generator=generator) * scale).to(self.device, self.dtype) for _ in range(E)
            )

        return SlotWeights(draw(2 * width, D), draw(D, width))

    def _own_weights(self) -> SlotWeights:
        """What this rank holds: its slots' experts, or a slice of every expert."""
        whole, rank = self.experts, self.group.rank
        if self.name != "tensor":
            own = self.placement.experts_on(rank, 0)
            return _stack([whole.gate_up[e] for e in own], [whole.down[e] for e in own])
        widths = split_evenly(self.case.intermediate, self.group.size)
        first = sum(widths[:rank])
        span = slice(first, first + widths[rank])
        gate_up = [torch.cat([half[span] for half in both.chunk(2)]) for both in whole.gate_up]
        return _stack(gate_up, [down[:, span] for down in whole.down])

    def one_pass(self, backend: All2All, number: int, rows: Sequence[int]) -> Tensor:
        """Dispatch, compute and combine one batch, checking each stage."""
        case = self.case
        inputs = [self._tokens(number, rank, count) for rank, count in enumerate(rows)]
        own = inputs[self.source]
        seen = [own] if self.alone else inputs
        slots = [self._slots(t, rank) for rank, t in enumerate(seen)]
        counts = tuple(len(t.x_TD) for t in seen)
        sent = backend.dispatch(own.x_TD, slots[self.group.rank], own.weight_TK, counts).wait()
        self._check_received(sent, slots)
        if case.fp8:
            self._check_fp8(sent, inputs, slots)
            own = replace(own, x_TD=dequantize_rows(*quantize_rows(own.x_TD), self.dtype))
        if hasattr(backend, "poison"):
            backend.poison()
        sent = _poison(sent)
        y = self.kernel(sent, self.weights, backend.takes)
        if backend.takes == "pairs":
            y[int(sent.count_S.sum()) :] = torch.nan
        result = backend.combine(y, sent).wait()
        assert result.shape == own.x_TD.shape, f"{self.name} returned {list(result.shape)} for {list(own.x_TD.shape)}"
        assert result.dtype == self.dtype, f"{self.name} returned {result.dtype} for {self.dtype}"
        where = f"{self.name}, pass {number}, rank {self.source}, {counts} rows"
        want = dense(own, self.experts)
        worst = float((result.float() - want).abs().max()) if len(want) else 0.0  # NaN compares false
        assert worst <= _TOLERANCE[case.dtype] * max(1.0, float(want.abs().max()) if len(want) else 0), (
            f"{where}: off by {worst}"
        )
        backend.check()
        assert not result[(own.expert_TK < 0).all(dim=1)].any(), f"{where}: padding did not give zero"
        if case.exact:
            alone = self._alone(own)
            assert torch.equal(result.view(torch.uint8), alone.view(torch.uint8)), f"{where}: not the same bits"
        return result

    def _tokens(self, number: int, rank: int, count: int) -> Tokens:
        case = self.case
        made = tokens(
            case.routing,
            case.seed + 7919 * number,
            rank,
            count,
            hidden_size=case.hidden_size,
            num_experts=case.num_experts,
            top_k=case.top_k,
            home=self.home,
            dtype=self.dtype,
        )
        if case.on_grid:
            made.x_TD[:] = (made.x_TD * 40).to(FP8)
            made.x_TD[:, ::ROW_BLOCK] = LARGEST
        return Tokens(made.x_TD.to(self.device), made.expert_TK.to(self.device), made.weight_TK.to(self.device))

    def _slots(self, given: Tokens, rank: int) -> Tensor:
        slot_TK = self.lookups[0 if self.alone else rank](given.expert_TK.clamp(min=0))
        return torch.where(given.expert_TK < 0, -1, slot_TK)

    def _check_received(self, sent: Dispatched, slots: list[Tensor]) -> None:
        """Every slot has its pairs, and a token came once, however many of its slots are here."""
        first, last = self.spec.first_slot, self.spec.first_slot + self.spec.num_slots
        if self.name == "tensor":
            first, last = 0, self.spec.fleet.num_slots
        slot_NK = torch.cat(slots)
        here_NK = (slot_NK >= first) & (slot_NK < last)
        count = torch.bincount(slot_NK[here_NK] - first, minlength=last - first).tolist()
        assert sent.count_S.tolist() == count, f"{self.name}: pairs by slot {sent.count_S.tolist()}, expected {count}"
        start = (sent.count_S.cumsum(0) - sent.count_S).tolist()
        assert sent.start_S.tolist() == start, f"{self.name}: slots start at {sent.start_S.tolist()}, expected {start}"
        rows, read = int(here_NK.any(dim=1).sum()), len(sent.row_M[: sum(count)].unique())
        assert read == rows, f"{self.name}: {read} rows are read, expected {rows}"
        if self.name in ONCE_A_RANK:
            assert len(sent.x_ND) == rows, f"{self.name}: {len(sent.x_ND)} rows came, expected {rows}"

    def _check_fp8(self, sent: Dispatched, inputs: list[Tokens], slots: list[Tensor]) -> None:
        """Rows that are read have the very numbers and factors of the specification."""
        assert sent.scale_Nd is not None, f"{self.name}: no factors"
        first, last = self.spec.first_slot, self.spec.first_slot + self.spec.num_slots
        slot_NK = torch.cat(slots)
        here_N = ((slot_NK >= first) & (slot_NK < last)).any(dim=1)
        read = sent.row_M[: int(sent.count_S.sum())].unique()
        want = quantize_rows(torch.cat([given.x_TD for given in inputs])[here_N])
        got = sent.x_ND.view(torch.uint8)[read], sent.scale_Nd[read]
        assert _bytes_of(*got) == _bytes_of(want[0].view(torch.uint8), want[1]), f"{self.name}: not the same FP8"

    def _alone(self, own: Tokens) -> Tensor:
        """The exact result by the local backend, which moves nothing: all experts in order on one rank."""
        whole = _stack(self.experts.gate_up, self.experts.down)
        backend = local.create(replace(self.spec, group=self.solo, fleet=Fleet((self.case.num_experts,))))
        sent = backend.dispatch(own.x_TD, own.expert_TK, own.weight_TK, [len(own.x_TD)]).wait()
        return backend.combine(reference.create()(sent, whole, backend.takes), sent).wait()


def dense(given: Tokens, experts: SlotWeights) -> Tensor:
    """[T, D] float32, the plain meaning of a MoE layer: for each token, the sum over k of weight * expert(x)."""
    x_TD = given.x_TD.float()
    out = torch.zeros_like(x_TD)
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        token, k = (given.expert_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up.float()).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down.float()) * given.weight_TK[token, k].unsqueeze(1)
        out.index_add_(0, token, y)
    return out


def _stack(gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> SlotWeights:
    """Slots that adjoin in memory, as a model holds them; a rank without slots has nothing to stack."""
    return SlotWeights.adjoining(torch.stack(list(gate_up)), torch.stack(list(down))) if down else SlotWeights((), ())


def _bytes_of(x_ND: Tensor, scale_Nd: Tensor) -> list[bytes]:
    """Rows with their factors, in an order that does not depend on who brought them."""
    both = zip(x_ND.cpu(), scale_Nd.cpu(), strict=True)
    return sorted(x_D.numpy().tobytes() + scale_d.numpy().tobytes() for x_D, scale_d in both)


def _poison(sent: Dispatched) -> Dispatched:
    """The same, with NaN in every row that no pair reads and wild values in every place past the pairs."""
    total = int(sent.count_S.sum())
    unread_N = torch.ones(len(sent.x_ND), dtype=torch.bool, device=sent.x_ND.device)
    unread_N[sent.row_M[:total]] = False
    past_M = torch.arange(len(sent.row_M), device=sent.row_M.device) >= total
    x_ND = sent.x_ND.clone()  # bytes of ones are NaN in every type
    x_ND.view(torch.uint8)[unread_N] = 255
    return replace(
        sent,
        x_ND=x_ND,
        row_M=sent.row_M.masked_fill(past_M, _WILD),
        weight_M=sent.weight_M.masked_fill(past_M, torch.nan),
    )
