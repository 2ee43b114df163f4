"""`combine: exact`: the same bits under every placement, use of replicas and all-to-all, and with chunked passes."""

from __future__ import annotations

import numpy as np
from oracle import MODELS, folder, prompts

from nonet import LLM, SamplingParams

NAME = "step2"  # 8 experts in layers 1 and 3; a vocabulary small enough that 100 log probabilities are all of it
LAYERS, EXPERTS = (1, 3), 8


def assignments(num_slots: int, seed: int) -> dict[int, list[int]]:
    """Every expert once and the rest at random, shuffled over the slots."""
    rng = np.random.default_rng(seed)
    return {
        layer: rng.permutation([*range(EXPERTS), *rng.integers(EXPERTS, size=num_slots - EXPERTS)]).tolist()
        for layer in LAYERS
    }


def all_log_probabilities(dp: int, backend: str, **moe) -> list:
    """Every log probability of prompts and outputs, as floats, and the tokens."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=100, prompt_logprobs=100, ignore_eos=True)
    vocabulary = int(MODELS[NAME]["vocab_size"])
    with LLM(
        folder(NAME), dtype="float32", data_parallel_size=dp, enable_expert_parallel=True, all2all_backend=backend,
        combine="exact", max_num_batched_tokens=64, max_num_seqs=8, **moe,
    ) as llm:  # fmt: skip
        outs = llm.generate(prompts(vocabulary, [5, 22, 11, 2, 9]), params)
    assert len(outs[0].prompt_logprobs[1]) == vocabulary
    return [
        (o.outputs[0].token_ids, [{t: p.logprob for t, p in entry.items()} for entry in o.outputs[0].logprobs],
         [{t: p.logprob for t, p in entry.items()} for entry in o.prompt_logprobs[1:]])
        for o in outs
    ]  # fmt: skip


def test_same_bits_over_backends_and_placements():
    wanted = all_log_probabilities(4, "allgather_reducescatter")
    replicas = {"num_slots": 12, "initial_global_assignments": assignments(12, seed=1)}
    shuffled = {"num_slots": 8, "initial_global_assignments": assignments(8, seed=2)}
    for backend, moe in (
        ("naive", {}),
        ("all2allv", replicas),
        ("shm", replicas),
        ("allgather_reducescatter", {"num_slots": 16}),
        ("all2allv", {**shuffled, "max_num_tokens": 20}),
        ("shm", {**replicas, "replica_dispatch": "waterfill"}),
        ("all2allv", {**replicas, "replica_dispatch": "waterfill", "max_num_tokens": 20}),
        ("naive", {**replicas, "replica_dispatch": "waterfill-average"}),
    ):
        assert all_log_probabilities(4, backend, **moe) == wanted, (backend, moe)
