"""What ranks record while they serve: every real token once, by slot, in the iterations asked for, however they end."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest
from oracle import folder, prompts

from nonet import LLM, AsyncLLM, ConfigError, EngineDeadError, SamplingParams
from nonet.eplb.statistics import read_statistics

EP2 = {"data_parallel_size": 2, "enable_expert_parallel": True, "dtype": "float32", "max_num_batched_tokens": 32,
       "max_num_seqs": 8}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TOP_K, VOCABULARY = 5, 131  # odd22: layer 1 of 3 is dense


def test_a_run_that_ends_early_has_counted_what_the_metrics_count(tmp_path, capfd):
    """22 experts in 24 slots; one request, so that the other rank runs dummy tokens, which are no load."""
    path = tmp_path / "made" / "here"
    recorded = {"expert_statistic_iter_range": "0-1000", "expert_statistic_path": str(path)}
    with LLM(folder("odd22"), num_slots=24, randomize_dp_dummy_inputs=True, **EP2, **recorded) as llm:
        assert not path.exists() or not list(path.iterdir()), "nothing is written before there is something"
        llm.generate(prompts(VOCABULARY, [70]), GREEDY)
        stats = llm.client.stats()
    found = read_statistics(path)
    load_RLE = np.array([s.load for s in stats])
    assert load_RLE.sum(axis=(0, 2)).tolist() == [(70 + 5) * TOP_K] * 2
    assert (found.logical().sum(axis=0) == load_RLE).all()
    assert (found.layers, found.first_iteration, found.top_k, found.num_experts) == ((0, 2), 0, TOP_K, 22)
    assert found.num_iterations == stats[0].steps == 3 + 5, "70 prompt tokens in chunks of 32, then one a step"
    assert sorted(found.count_NRLG.sum(axis=(0, 2, 3)).tolist()) == [0, 75 * TOP_K * 2]
    tokens_N = found.count_NRLG.sum(axis=(1, 3))[:, 0] // TOP_K
    assert tokens_N.tolist() == [32, 32, 6, 1, 1, 1, 1, 1]
    assert found.placement.fleet.slots_by_rank == (12, 12)
    assert (found.replay(found.placement).count_NRLG == found.count_NRLG).all(), "the rule of replicas is known"
    wanted = f"the run ended after iteration 7: 8 of 1000 iterations are recorded in {path}"
    assert f"expert_statistic_iter_range = '0-1000': {wanted}" in capfd.readouterr().err


def test_iterations_are_half_open_and_tensor_parallel_ranks_count_a_token_once(tmp_path):
    recorded = {"expert_statistic_iter_range": "1-3", "expert_statistic_path": str(tmp_path)}
    settings = {**EP2, "tensor_parallel_size": 2, "data_parallel_size": 1}
    with LLM(folder("odd22"), **settings, **recorded) as llm:
        llm.generate(prompts(VOCABULARY, [39]), GREEDY)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "meta_info.json",
            "rank0.safetensors",
            "rank1.safetensors",
        ]
    found = read_statistics(tmp_path)
    assert (found.first_iteration, found.num_iterations, found.num_ranks) == (1, 2, 2)
    assert found.count_NRLG.shape[-1] == 22, "without a balancer a slot is an expert"
    tokens_NR = found.count_NRLG[:, :, 0].sum(axis=-1) / TOP_K
    assert tokens_NR.tolist() == [[4, 3], [1, 0]], "the rest of the prompt, a token; ranks of a group divide them"


def test_without_expert_parallelism_experts_are_counted_too(tmp_path):
    recorded = {"expert_statistic_iter_range": "0-2", "expert_statistic_path": str(tmp_path)}
    settings = {**EP2, "enable_expert_parallel": False}
    with LLM(folder("odd22"), **settings, **recorded) as llm:
        llm.generate(prompts(VOCABULARY, [20, 9]), GREEDY)
    found = read_statistics(tmp_path)
    assert (found.spread, found.num_ranks, found.placement.fleet.num_slots) == (False, 2, 22)
    assert found.count_NRLG.sum() >= 20 * TOP_K * 2, "of both ranks, or of the first to have work"
    assert found.count_NRLG[0].sum(axis=-1).max() in (20 * TOP_K, 9 * TOP_K)


def test_a_killed_rank_leaves_what_was_recorded(tmp_path):
    recorded = {"expert_statistic_iter_range": "2-100000", "expert_statistic_path": str(tmp_path)}

    async def run() -> None:
        llm = AsyncLLM(folder("odd22"), **EP2, **recorded)

        async def read() -> None:
            victim = llm.client.pids[1]
            async for output in llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)):
                if victim and len(output.outputs[0].token_ids) >= 12:  # several may come at once
                    os.kill(victim, signal.SIGKILL)
                    victim = 0

        with pytest.raises(EngineDeadError, match="rank 1 died"):
            await read()
        await asyncio.to_thread(llm.close)

    asyncio.run(run())
    found = read_statistics(tmp_path)
    assert found.first_iteration == 2
    assert 9 <= found.num_iterations < 400
    assert (found.count_NRLG.sum(axis=(1, 3)) == TOP_K).all()


def test_a_run_that_never_comes_so_far_says_so_and_keeps_what_was_there(tmp_path, capfd):
    (tmp_path / "rank0.safetensors").write_text("of an earlier run")
    recorded = {"expert_statistic_iter_range": "100-200", "expert_statistic_path": str(tmp_path)}
    with LLM(folder("odd22"), **{**EP2, "data_parallel_size": 1}, **recorded) as llm:
        llm.generate(prompts(VOCABULARY, [4]), GREEDY)
    assert (tmp_path / "rank0.safetensors").read_text() == "of an earlier run"
    assert "the run ended after iteration 5: 0 of 100 iterations are recorded" in capfd.readouterr().err


def test_a_folder_that_cannot_be_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    recorded = {"expert_statistic_iter_range": "0-1", "expert_statistic_path": str(tmp_path / "file" / "under")}
    with pytest.raises(ConfigError, match=r"^expert_statistic_path = '.*/file/under': cannot be made: Not a directory"):
        LLM(folder("odd22"), **{**EP2, "data_parallel_size": 1}, **recorded)
