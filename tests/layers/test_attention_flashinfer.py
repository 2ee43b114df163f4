"""FlashInfer against the plain form, where it is installed. Its plans are made on any machine."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Paged

from nonet.errors import ConfigError
from nonet.layers.attention import PLAIN, AttentionBatch, Sight, attend
from nonet.layers.attention_flashinfer import FlashInfer

SPANS = [(40, 1), (0, 1), (0, 37), (50, 20), (100, 2)]  # tokens before, and new ones
LONG = [(3000, 1), (700, 1), *SPANS, (900, 150)]  # long enough to be attended to in parts


def step(paged: Paged, spans: list[tuple[int, int]]) -> AttentionBatch:
    return paged.attention([(paged.take(start + count), start, count) for start, count in spans])


def paged_for(backend: str, device: str, block_size: int) -> Paged:
    blocks = -(-10_000 // block_size)
    return Paged(num_blocks=blocks, block_size=block_size, backend=backend, device=torch.device(device))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed")
@pytest.mark.parametrize(
    ("sight", "dtype", "block_size"),
    [
        (PLAIN, torch.bfloat16, 16),
        (PLAIN, torch.float16, 64),
        (Sight(window=20, scale=0.2), torch.bfloat16, 16),
        (Sight(window=500), torch.bfloat16, 16),
        (Sight(window=1), torch.bfloat16, 5),
    ],
)
def test_steps_are_the_plain_form(sight, dtype, block_size):
    """What stands where no token is may be no number."""
    kinds = LONG, LONG[:4], SPANS[2:]  # of both, decoding alone, prompts alone
    paged, other = (paged_for(backend, "cuda", block_size) for backend in ("flashinfer", "reference"))
    for batch, plain in [(step(paged, spans), step(other, spans)) for spans in kinds]:
        rows = len(plain.position_T)
        q_THd = torch.randn((rows, 8, 128), device="cuda", dtype=dtype)
        used = torch.cat([part.place_C for part in plain.prefills] + [decoded(plain)])
        for layer in range(2):  # the second one has its plan already
            cache = torch.full((2, paged.places, 2, 128), torch.nan, device="cuda", dtype=dtype)
            cache[:, used] = torch.randn((2, len(used), 2, 128), device="cuda", dtype=dtype)
            want = attend(q_THd.float(), cache.float().unbind(), plain, sight)
            got = attend(q_THd, cache.unbind(), batch, sight).float()
            off_T = (got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))
            assert float(off_T.max()) <= 2e-2, layer


def decoded(batch: AttentionBatch) -> torch.Tensor:
    """Where the contexts of decoding sequences lie."""
    size, lengths = batch.block_size, batch.decode_length_B.tolist()
    places = (batch.decode_block_BN.unsqueeze(2) * size + torch.arange(size, device="cuda")).flatten(1)
    own = [place[:length] for place, length in zip(places, lengths, strict=True)]
    return torch.cat([batch.decode_length_B[:0], *own])


class Planner:
    """Stands for both wrappers of the library: notes what it is told."""

    def __init__(self, workspace: torch.Tensor, use_tensor_cores: bool = False) -> None:
        self.plans: list[tuple[list[object], dict[str, object]]] = []

    def plan(self, *given: object, **more: object) -> None:
        self.plans.append(([x.tolist() if isinstance(x, torch.Tensor) else x for x in given], more))

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        out.copy_(q + pages[0].shape[1])


KNOWN = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Planner, BatchPrefillWithPagedKVCacheWrapper=Planner)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", KNOWN)


def test_it_is_told_each_step_once_a_kind_of_layer(library):
    paged = paged_for("flashinfer", "cpu", 16)
    given = [(paged.take(start + count), start, count) for start, count in SPANS]
    batch = paged.attention(given)
    own = [number for blocks, _, _ in given for number in blocks]
    cache = torch.zeros((2, paged.places, 2, 8)).unbind()
    q_THd = torch.randn((61, 4, 8))
    assert batch.prefills == (), "nobody else attends"
    for sight in (PLAIN, PLAIN, Sight(window=20, scale=0.5)):
        assert torch.equal(attend(q_THd, cache, batch, sight), q_THd + 16)
    planners = {(kind.window, decodes): p for (kind, decodes), p in paged.builder.flashinfer._planners.items()}
    assert [len(planners[key].plans) for key in ((None, True), (None, False), (20, True), (20, False))] == [1] * 4
    [(decoding, settings)], [(prompts, theirs)] = planners[20, True].plans, planners[20, False].plans
    dtypes = {"q_data_type": torch.float32, "kv_data_type": torch.float32}
    assert settings == {"window_left": 19, "sm_scale": 0.5, **dtypes}
    assert theirs == {**settings, "causal": True}
    assert planners[None, False].plans[0][1] == {"window_left": -1, "sm_scale": None, "causal": True, **dtypes}
    used, blocks, last, *shape = decoding
    assert (used, blocks, last, shape) == ([0, 3, 4], own[:4], [41 - 32, 1], [4, 2, 8, 16])
    rows, used, blocks, last, *shape = prompts
    assert (rows, used, last, shape) == ([0, 37, 57, 59], [0, 3, 8, 15], [37 - 32, 70 - 64, 102 - 96], [4, 2, 8, 16])
    assert blocks == own[4:]


def test_steps_take_turns(library):
    """A planner holds one plan: a step that comes back after another has planned would attend by the other's."""
    paged = paged_for("flashinfer", "cpu", 16)
    first, second = step(paged, [(3, 1)]), step(paged, [(7, 1)])
    cache, q_THd = torch.zeros((2, paged.places, 2, 8)).unbind(), torch.zeros((1, 4, 8))
    attend(q_THd, cache, first)
    attend(q_THd, cache, second)
    with pytest.raises(AssertionError, match="another step has planned since"):
        attend(q_THd, cache, first)


LAYER = SimpleNamespace(num_heads=4, num_kv_heads=2, head_dim=8, sight=PLAIN)


def test_kernels_are_asked_for_before_the_first_step(library):
    layers = [LAYER, LAYER, SimpleNamespace(**{**vars(LAYER), "sight": Sight(window=20)})]
    flashinfer = FlashInfer(16, torch.device("cpu"))
    flashinfer.prepare(layers, torch.bfloat16)
    asked = sorted((kind.window or 0, decodes, len(p.plans)) for (kind, decodes), p in flashinfer._planners.items())
    assert asked == [(0, False, 1), (0, True, 1), (20, False, 1), (20, True, 1)]


def test_without_a_compiler_it_is_refused(library, monkeypatch):
    def fails(self: Planner, *given: object, **more: object) -> None:
        raise RuntimeError("Ninja build failed. Ninja output:\n[1/9] nvcc\na.cu(7): error: no\nninja: build stopped")

    monkeypatch.setattr(Planner, "plan", fails)
    with pytest.raises(ConfigError) as error:
        FlashInfer(16, torch.device("cpu")).prepare([LAYER], torch.bfloat16)
    problem = "its kernels cannot be compiled here (a.cu(7): error: no); install nvcc and ninja, or use triton"
    assert str(error.value) == f"attention_backend = 'flashinfer': {problem}"


def worker_with_the_stand_in(world) -> list[list[int]]:
    """On each rank: how often each planner was told something, once the worker is there and after a step."""
    from nonet.config import build_config
    from nonet.config.checkpoint import read_spec
    from nonet.config.resolve import resolve
    from nonet.engine.worker import Worker

    settings = build_config("nonet-tiny", data_parallel_size=2, device="cpu", num_blocks=8)
    spec = read_spec(settings.model.model)
    config = resolve(settings, spec, num_gpus=0)
    model = config.model.model_copy(update={"attention_backend": "flashinfer"})  # resolve knows that it is for GPUs
    sys.modules["flashinfer"] = KNOWN
    try:
        worker = Worker(config.model_copy(update={"model": model}), spec, world)
        planners = worker.builder.flashinfer._planners
        told = [[len(planners[key].plans) for key in sorted(planners, key=lambda key: key[1])]]
        worker.run_dummy(3, [3, 3])
        told.append([len(planners[key].plans) for key in sorted(planners, key=lambda key: key[1])])
        worker.close()
    finally:
        del sys.modules["flashinfer"]
    return told


def test_a_rank_is_ready_when_they_are_compiled(cluster2):
    prompts, decoding = 0, 1
    for ready, after in cluster2.run(worker_with_the_stand_in):
        assert ready == [1, 1]
        assert (after[prompts], after[decoding]) == (1, 2), "one plan for all layers of a step"


@pytest.mark.parametrize(
    ("sight", "what"), [(Sight(chunk=8), "attention in chunks"), (Sight(sink_H=torch.ones(4)), "sinks")]
)
def test_what_it_does_not_do_is_refused(library, sight, what):
    paged = paged_for("flashinfer", "cpu", 16)
    cache, batch = torch.zeros((2, paged.places, 2, 8)).unbind(), step(paged, SPANS)
    layer = SimpleNamespace(**{**vars(LAYER), "sight": sight})
    with pytest.raises(ConfigError, match=f"flashinfer.*has no {what}, which the model needs; use triton"):
        paged.builder.flashinfer.prepare([layer], torch.bfloat16)
    with pytest.raises(ConfigError, match=f"flashinfer.*has no {what}, which the model needs; use triton"):
        attend(torch.zeros((61, 4, 8)), cache, batch, sight)
