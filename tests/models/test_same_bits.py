"""`combine: exact` in every family: where experts live and how rows travel does not change one bit of the logits."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
import torch
from small import prompts

from nonet.config.checkpoint import read_spec

RANKS = 4
FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("*_models.py"))
WAYS = [("allgather_reducescatter", 0), ("all2allv", 4), ("shm", 8)]  # and slots beyond one an expert


def run_each(world, folder: str, prompt: list[int], settings: list[dict]):
    """On each rank, for each of the settings: load, run the prompt, hand back the logits."""
    from nonet.config import build_config
    from nonet.config.checkpoint import read_spec
    from nonet.config.resolve import resolve
    from nonet.engine.messages import StepBatch
    from nonet.engine.worker import Worker

    out, spec = [], read_spec(folder)
    for chosen in settings:
        config = build_config(
            folder, dtype="float32", data_parallel_size=RANKS, enable_expert_parallel=True, device="cpu",
            num_blocks=8, combine="exact", **chosen,
        )  # fmt: skip
        worker = Worker(resolve(config, spec, num_gpus=0), spec, world)
        own = prompt[world.rank :]  # each rank another sequence
        step = StepBatch(own, [0], [len(own)], [list(range(8))], list(range(len(own))))
        out.append(worker.run(step, [len(prompt) - rank for rank in range(RANKS)]))
        worker.close()
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, cluster4, tmp_path):
    make, *_ = importlib.import_module(family).MODELS.values()
    make(tmp_path)
    spec, pick = read_spec(str(tmp_path)), random.Random(5)
    settings = []
    for backend, more in WAYS:
        slots = -(-(spec.num_experts + more) // RANKS) * RANKS
        experts = [*range(spec.num_experts), *(pick.randrange(spec.num_experts) for _ in range(slots))][:slots]
        given = {layer: pick.sample(experts, slots) for layer in spec.moe_layers}
        settings.append({"all2all_backend": backend, "num_slots": slots, "initial_global_assignments": given})
    for logits in cluster4.run(run_each, str(tmp_path), prompts(spec.vocab_size, [40])[0], settings):
        assert logits[0].isfinite().all()
        assert all(torch.equal(other, logits[0]) for other in logits[1:])
