"""Engines on one and two GPUs against transformers on the CPU: tokens by the equality rule; those of bfloat16 by how
much worse than its own the reference finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import folder, prompts, reference
from test_tiny import KINDS

import nonet
from nonet import LLM, ConfigError, SamplingParams
from nonet.testing.equality import check_equality

BACKENDS = ["allgather_reducescatter", "naive", "all2allv", "nvlink_low_latency", "nvlink_high_throughput", "off"]
TINY = str(Path(nonet.__file__).parent / "assets" / "nonet-tiny")


@pytest.mark.gpus(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1)])
def test_tokens_equal_transformers(tp, dp, backend):
    settings = {} if backend == "off" else {"enable_expert_parallel": True, "all2all_backend": backend}
    with LLM(
        "nonet-tiny", dtype="float32", device="cuda", tensor_parallel_size=tp, data_parallel_size=dp,
        max_num_batched_tokens=256, max_num_seqs=16, gpu_memory_utilization=0.3, **settings,
    ) as llm:  # fmt: skip
        prompts = [text[:400] for texts in KINDS.values() for text in texts[:2]]
        outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        stats = llm.client.stats()
        assert all(s.free_blocks == s.num_blocks for s in stats)
        assert {s.max_step_tokens <= 256 for s in stats} == {True}
    found = check_equality(reference(TINY), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])
    print(f"tp {tp} dp {dp} {backend}: {found}")


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["grouped", "triton"])
def test_one_gpu_alone(experts):
    with LLM(
        "nonet-tiny", dtype="float32", device="cuda", gpu_memory_utilization=0.3, expert_backend=experts
    ) as llm:  # fmt: skip
        prompts = [text[:400] for texts in KINDS.values() for text in texts[:2]]
        outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    check_equality(reference(TINY), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])


@pytest.mark.parametrize("dp", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpus(2))])
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_attention_in_bfloat16(dp, backend):
    """Prompts in chunks beside sequences that decode; of two replicas one is idle at the end."""
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    given = prompts(131, [1, 5, 17, 64, 100, 130, 200, 3, 40])
    with LLM(
        folder("heads128"), dtype="bfloat16", device="cuda", attention_backend=backend, data_parallel_size=dp,
        enable_expert_parallel=dp > 1, max_num_batched_tokens=64, max_num_seqs=6, gpu_memory_utilization=0.3,
    ) as llm:  # fmt: skip
        assert llm.config.model.attention_backend == backend
        lengths = [8, 60, 30, 40, 16, 50, 20, 90, 7]
        wanted = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        outs = llm.generate(given, wanted)
    gaps = []
    for prompt, out, length in zip(given, outs, lengths, strict=True):
        tokens = out.outputs[0].token_ids
        assert len(tokens) == length
        logits = reference(folder("heads128"))(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps += ((logits.amax(dim=1) - chosen) / logits.std(dim=1)).tolist()
    print(f"dp {dp} {backend}: {sum(gap > 0 for gap in gaps)} of {len(gaps)} differ, at most {max(gaps):.2f}")
    assert max(gaps) < 0.5, "another token than the best by so much of the logits' standard deviation"
    assert sum(gap > 0 for gap in gaps) < 0.1 * len(gaps)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("backend", ["allgather_reducescatter", "nvlink_low_latency"])
@pytest.mark.parametrize("rule", ["even", "waterfill", "waterfill-average"])
def test_replicas_and_grouped_products_on_two_gpus(rule, backend):
    with LLM(
        "nonet-tiny", dtype="float32", device="cuda", data_parallel_size=2, enable_expert_parallel=True,
        all2all_backend=backend, expert_backend="triton", num_slots=36, replica_dispatch=rule,
        max_num_batched_tokens=256, max_num_seqs=16, gpu_memory_utilization=0.3,
    ) as llm:  # fmt: skip
        prompts = [text[:400] for texts in KINDS.values() for text in texts[:2]]
        outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    print(check_equality(reference(TINY), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs]))


@pytest.mark.gpus(2)
def test_shared_memory_is_refused_on_gpus():
    with pytest.raises(ConfigError, match="moves CPU tensors"):
        LLM("nonet-tiny", device="cuda", data_parallel_size=2, enable_expert_parallel=True, all2all_backend="shm")
