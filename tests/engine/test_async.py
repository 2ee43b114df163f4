"""AsyncLLM over four ranks: bursts, aborts, idle ranks, balance of requests over ranks."""

from __future__ import annotations

import asyncio
import random

import pytest
from oracle import folder, prompts, reference

from nonet import LLM, AsyncLLM, RequestError, SamplingParams
from nonet.testing.equality import check_equality

SETTINGS = {
    "data_parallel_size": 4, "enable_expert_parallel": True, "all2all_backend": "shm", "dtype": "float32",
    "num_blocks": 256,
}  # fmt: skip


async def last(stream):
    outs = [out async for out in stream]
    return outs[-1]


def test_a_thousand_bursts_without_a_hang():
    """Requests arrive in bursts of random size at random gaps, some are abandoned; all end, all blocks come back."""
    rng = random.Random(0)

    async def abandoned(stream):
        async for out in stream:
            if len(out.outputs[0].token_ids) >= 2:
                break
        await stream.aclose()

    async def run() -> None:
        async with AsyncLLM(folder("top1"), **SETTINGS) as llm:
            tasks = []
            for burst in range(1000):
                for _ in range(rng.choice([1, 1, 1, 2, 5])):
                    tokens = [rng.randrange(64) for _ in range(rng.randrange(1, 20))]
                    params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 8), ignore_eos=True)
                    stream = llm.stream(tokens, params)
                    tasks.append(asyncio.create_task(abandoned(stream) if rng.random() < 0.1 else last(stream)))
                await asyncio.sleep(rng.choice([0, 0, 0.002, 0.02]))
                if burst % 100 == 99:
                    await asyncio.wait_for(asyncio.gather(*tasks), 60)
                    tasks.clear()
            stats = await llm.stats()
            assert all(s.free_blocks == s.num_blocks for s in stats)
            assert llm.pending == [0, 0, 0, 0]
            assert all(s.sleeps > 0 for s in stats)

    asyncio.run(run())


def test_idle_ranks_keep_step_and_then_sleep():
    """One request on one rank: the others enter as many collectives while it runs, and rest afterwards."""

    async def run() -> None:
        settings = {**SETTINGS, "all2all_backend": "allgather_reducescatter"}
        async with AsyncLLM(folder("top1"), **settings) as llm:
            before = await asyncio.to_thread(llm.client.stats)
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            out = await last(llm.stream([5] * 20, params, data_parallel_rank=2))
            after = await asyncio.to_thread(llm.client.stats)
            assert out.dp_rank == 2
            assert [b.tokens - a.tokens for a, b in zip(before, after, strict=True)] == [0, 0, 59, 0]
            entered = {b.collectives - a.collectives for a, b in zip(before, after, strict=True)}
            assert entered == {40 * 2 * 2}  # steps x MoE layers x (dispatch, combine)
            await asyncio.sleep(5)
            rested = await asyncio.to_thread(llm.client.stats)
            for a, b in zip(after, rested, strict=True):
                assert b.cpu_seconds - a.cpu_seconds < 0.05  # 1 % of a core over 5 s
                assert b.steps == a.steps

    asyncio.run(run())


def test_abort_ends_the_stream_and_frees_the_blocks():
    async def run() -> None:
        async with AsyncLLM(folder("top1"), **SETTINGS) as llm:
            params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, n=2)
            stream = llm.stream([1, 2, 3], params, request_id="mine")
            await anext(stream)
            with pytest.raises(RequestError, match="is in use"):
                await anext(llm.stream([4], params, request_id="mine"))
            await llm.abort("mine", n=2)
            out = await asyncio.wait_for(last(stream), 10)
            assert [o.finish_reason for o in out.outputs] == ["abort", "abort"]
            assert llm.client.pending == [0, 0, 0, 0]
            stats = await asyncio.to_thread(llm.client.stats)
            assert all(s.free_blocks == s.num_blocks for s in stats)

    asyncio.run(run())


def test_an_id_is_free_for_another_request_once_it_is_aborted():
    """The old stream, which has not noticed yet, neither disturbs the new one nor gets anything of it."""

    async def run() -> None:
        async with AsyncLLM(folder("top1"), **SETTINGS) as llm:
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            alone = (await last(llm.stream([9, 8, 7], params))).outputs[0].token_ids
            for _ in range(6):
                old = llm.stream([1, 2, 3], params, request_id="mine")
                await anext(old)
                await llm.abort("mine")
                new = llm.stream([9, 8, 7], params, request_id="mine")
                kept = await anext(new)
                await old.aclose()
                out = await last(new)
                assert (out.outputs[0].token_ids, out.outputs[0].finish_reason) == (alone, "length")
                assert kept.outputs[0].token_ids == alone[: len(kept.outputs[0].token_ids)]
            assert llm.pending == [0, 0, 0, 0]

    asyncio.run(run())


def test_one_engine_serves_several_event_loops_one_after_the_other():
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    llm = AsyncLLM(folder("top1"), dtype="float32", num_blocks=64)
    try:
        outs = [asyncio.run(last(llm.stream([1, 2], params))).outputs[0].token_ids for _ in range(3)]
        assert outs[0] == outs[1] == outs[2]
    finally:
        llm.close()


def test_requests_spread_and_a_rank_can_be_pinned():
    async def run() -> None:
        async with AsyncLLM(folder("top1"), **SETTINGS) as llm:
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            outs = await asyncio.gather(*(last(llm.stream([i % 64], params)) for i in range(200)))
            shares = [sum(o.dp_rank == r for o in outs) for r in range(4)]
            assert min(shares) > 200 / 5
            pinned = await asyncio.gather(
                *(last(llm.stream([i], params, data_parallel_rank=3)) for i in range(8))
            )
            assert {o.dp_rank for o in pinned} == {3}
            with pytest.raises(RequestError, match="data_parallel_rank = 4"):
                await last(llm.stream([1], params, data_parallel_rank=4))

    asyncio.run(run())


def test_neighbours_do_not_change_a_seeded_sample():
    """The same request alone and among others, on whatever rank: the same tokens."""
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=24, ignore_eos=True)
    noise = SamplingParams(temperature=1.3, seed=None, max_tokens=30, ignore_eos=True)
    with LLM(folder("odd22"), **{**SETTINGS, "all2all_backend": "all2allv"}) as llm:
        prompt = prompts(131, [12], seed=3)[0]
        alone = llm.generate([prompt], params)[0].outputs[0].token_ids
        many = llm.generate([*prompts(131, [9, 30, 4, 50, 22], seed=5), prompt], [noise] * 5 + [params])
        assert many[-1].outputs[0].token_ids == alone
        three = SamplingParams(temperature=1.0, top_p=0.9, seed=11, n=3, max_tokens=24, ignore_eos=True)
        n3 = llm.generate([prompt], three)
        assert [o.index for o in n3[0].outputs] == [0, 1, 2]
        assert n3[0].outputs[0].token_ids == alone
        assert len({tuple(o.token_ids) for o in n3[0].outputs}) == 3


def test_log_probabilities_are_the_references():
    import torch

    path = folder("odd22")
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    with LLM(path, dtype="float32", max_num_batched_tokens=16, max_num_seqs=4) as llm:
        prompt = prompts(131, [40], seed=8)[0]
        first = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
        out = llm.generate([prompt], params)[0]  # its prefix is cached, and must be computed all the same
    assert out.outputs[0].token_ids == first.outputs[0].token_ids
    table = torch.log_softmax(reference(path)(prompt + out.outputs[0].token_ids), dim=-1)
    assert out.num_cached_tokens == 0
    assert out.prompt_logprobs[0] is None
    for position, entry in enumerate(out.prompt_logprobs[1:]):
        token = prompt[position + 1]
        assert entry[token].logprob == pytest.approx(float(table[position, token]), abs=1e-4)
        assert len(entry) in (2, 3)
    for i, entry in enumerate(out.outputs[0].logprobs):
        best = table[len(prompt) - 1 + i].topk(3)
        assert {t for t, p in entry.items() if p.rank <= 3} == set(best.indices.tolist())
        assert entry[out.outputs[0].token_ids[i]].rank == 1
    assert check_equality(reference(path), [(prompt, out.outputs[0].token_ids)]).holds


def test_simulated_routing_reaches_the_imbalance_it_was_asked_for():
    with pytest.warns(UserWarning, match="outputs are meaningless"):
        llm = LLM(folder("step2"), **SETTINGS, routing_simulation="imbalance:0.5")
    with llm:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        llm.generate(prompts(97, [100] * 8), params)
        load = torch_sum([s.load for s in llm.client.stats()])
    for layer in load:
        by_rank = [sum(layer[r * 2 : r * 2 + 2]) for r in range(4)]
        mean = sum(by_rank) / 4
        assert (max(by_rank) - mean) / mean == pytest.approx(0.5, abs=0.05)


def torch_sum(loads: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(values) for values in zip(*rows, strict=True)] for rows in zip(*loads, strict=True)]


def test_random_dummies_travel_but_are_no_load():
    with LLM(folder("step2"), **SETTINGS, randomize_dp_dummy_inputs=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        out = llm.generate(prompts(97, [16]), params)[0]
        stats = llm.client.stats()
        assert sum(sum(map(sum, s.load)) for s in stats) == (16 + 9) * 2 * 2  # tokens x MoE layers x top-2
        assert [s.tokens for s in stats].count(0) == 3
        assert len({s.steps for s in stats}) == 1
    assert check_equality(reference(folder("step2")), [(out.prompt_token_ids, out.outputs[0].token_ids)]).holds
