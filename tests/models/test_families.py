"""Every family's small models on whole engines, against transformers by the equality rule.

A family is a module `<family>_models.py` beside this file; its MODELS make folders. Each case runs with a token budget
that chunks prompts, few enough blocks that sequences are preempted, prompts that outgrow windows and chunks of
attention, and a second round whose prompts start with what the first computed. Layouts, all-to-alls and placements are
spread so that every family meets every one of them, and every two of them meet; all combinations only with --full.
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small import prompts, reference

from nonet import LLM, SamplingParams
from nonet.config.checkpoint import read_spec
from nonet.models.base import families
from nonet.testing.equality import check_equality

Maker = Callable[[Path], None]

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 4)]  # (TP, DP)
BACKENDS = ["naive", "allgather_reducescatter", "all2allv", "shm", "off"]
ELSEWHERE = "qwen3_moe"  # whose layouts and all-to-alls tests/engine/test_equality.py goes through
BUDGET, BLOCK = 24, 8
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    family: str
    model: str
    layout: tuple[int, int]
    backend: str
    replicas: bool = False

    @property
    def name(self) -> str:
        kind = self.backend + "-replicas" * self.replicas
        return f"{self.family}-{self.model}-tp{self.layout[0]}dp{self.layout[1]}-{kind}"


def found() -> dict[str, dict[str, Maker]]:
    """Families with their models, by listing this folder."""
    files = sorted(Path(__file__).parent.glob("*_models.py"))
    return {f.name.removesuffix("_models.py"): importlib.import_module(f.stem).MODELS for f in files}


def spread() -> Iterator[Case]:
    """A Latin square: family i takes all-to-all j in layout i + j, its models in turn, and replicas every other time.

    Every model runs on one rank, too.
    """
    for family, models in found().items():
        for model in models:
            yield Case(family, model, (1, 1), "local")
    for i, (family, models) in enumerate((f, m) for f, m in found().items() if f != ELSEWHERE):
        names = itertools.cycle(models)
        for j, backend in enumerate(BACKENDS):
            replicas = backend != "off" and (i // 2 + j) % 2 == 0
            yield Case(family, next(names), LAYOUTS[(i + j) % len(LAYOUTS)], backend, replicas)


def everything() -> Iterator[Case]:
    for family, models in found().items():
        for model, layout, backend, replicas in itertools.product(models, LAYOUTS, BACKENDS, (False, True)):
            if not (replicas and backend == "off"):
                yield Case(family, model, layout, backend, replicas)


def parameters() -> list[object]:
    chosen = list(spread())
    rest = [case for case in everything() if case not in chosen]
    slow = [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in rest]
    return [pytest.param(case, id=case.name) for case in chosen] + slow


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[Case], Path]:
    """The saved model of a case; float32, made once a session."""
    root, made = tmp_path_factory.mktemp("families"), set()

    def folder(case: Case) -> Path:
        path = root / f"{case.family}-{case.model}"
        if path not in made:
            path.mkdir()
            found()[case.family][case.model](path)
            made.add(path)
        return path

    return folder


def replicated(path: Path, ranks: int) -> dict[str, object]:
    """Settings of a random placement with replicas, the same number of slots on every rank."""
    spec, pick = read_spec(str(path)), random.Random(3)
    slots = (spec.num_experts // ranks + 1) * ranks
    given = {}
    for layer in spec.moe_layers:
        row = [*range(spec.num_experts), *(pick.randrange(spec.num_experts) for _ in range(slots - spec.num_experts))]
        given[layer] = pick.sample(row, len(row))
    return {"num_slots": slots, "initial_global_assignments": given}


@pytest.mark.parametrize("case", parameters())
def test_tokens_equal_transformers(case, folder_of):
    hold_against_transformers(case, folder_of(case), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in spread() if case.backend == "local"], ids=lambda case: case.name)
def test_tokens_of_a_gpu_equal_transformers(case, folder_of):
    hold_against_transformers(case, folder_of(case), "cuda")


def hold_against_transformers(case: Case, path: Path, device: str) -> None:
    tp, dp = case.layout
    settings: dict[str, object] = {"device": device}
    if case.backend not in ("local", "off"):
        settings |= {"enable_expert_parallel": True, "all2all_backend": case.backend}
    if case.replicas:
        settings |= replicated(path, tp * dp)
    with LLM(
        str(path), dtype="float32", tensor_parallel_size=tp, data_parallel_size=dp, block_size=BLOCK, num_blocks=24,
        max_num_batched_tokens=BUDGET, max_num_seqs=6, **settings,
    ) as llm:  # fmt: skip
        first = prompts(read_spec(str(path)).vocab_size, [1, 3, 17, 40, 70, 33, 64, 9] * (1 + (dp > 1)))
        outs = llm.generate(first, GREEDY)
        found_first = check_equality(reference(path), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])
        stats = llm.client.stats()
        assert all(s.max_step_tokens <= BUDGET for s in stats)
        assert sum(s.preemptions for s in stats) > 0
        again = outs[4].prompt_token_ids + outs[4].outputs[0].token_ids
        second = [llm.generate([again], GREEDY)[0] for _ in range(1 + dp)]  # at least one rank sees it twice
        found_again = check_equality(reference(path), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in second])
        assert sum(o.num_cached_tokens for o in second) >= len(again) // BLOCK * BLOCK
        assert all(s.free_blocks == s.num_blocks for s in llm.client.stats())
    print(f"{found_first}; {found_again}")


# -- the list of cases itself -----------------------------------------------------------------------------------------


def test_every_family_is_here():
    assert set(found()) == set(families())
    assert all(found().values())


def test_every_two_of_them_meet():
    cases = [case for case in spread() if case.backend != "local"]
    met = {pair for case in cases for pair in itertools.combinations(_values(case), 2)}
    values = [("family", name) for name in found() if name != ELSEWHERE]
    values += [("layout", layout) for layout in LAYOUTS]
    values += [("backend", backend) for backend in BACKENDS]
    values += [("replicas", there) for there in (False, True)]
    pairs = {(a, b) for a, b in itertools.combinations(values, 2) if a[0] != b[0]}
    assert pairs - met == {(("backend", "off"), ("replicas", True))}


def test_every_model_is_run():
    run = {(case.family, case.model) for case in spread()}
    assert run == {(family, model) for family, models in found().items() for model in models}


def _values(case: Case) -> tuple[tuple[str, object], ...]:
    return (("family", case.family), ("layout", case.layout), ("backend", case.backend), ("replicas", case.replicas))
