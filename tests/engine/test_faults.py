"""What dies, dies loudly and leaves nothing: ranks, the supervisor, the front end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracle import folder

from nonet import LLM, AsyncLLM, ConfigError, EngineDeadError, ModelError, RequestError, SamplingParams
from tests.processes import living

LONG = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)
SETTINGS = {"data_parallel_size": 4, "enable_expert_parallel": True, "dtype": "float32"}


async def ends_under_load(llm: AsyncLLM, number: int, pid: int) -> tuple[set[str], float]:
    """What requests say of a process that gets a signal, and after how many seconds the last did."""
    started = asyncio.Event()

    async def request(i: int) -> str:
        try:
            async for _ in llm.stream([1 + i, 2, 3], LONG):
                started.set()
        except EngineDeadError as error:
            return str(error)
        return "finished"

    tasks = [asyncio.create_task(request(i)) for i in range(12)]
    await started.wait()
    assert llm.dead is None
    at = time.monotonic()
    os.kill(pid, number)
    return set(await asyncio.gather(*tasks)), time.monotonic() - at


async def kill_under_load(victim: int, settings: dict) -> None:
    """`victim` is a rank, or -1 for the supervisor."""
    llm = AsyncLLM(folder("top1"), **settings)
    pids = [*llm.client.pids, llm.client.supervisor_pid]
    waiting = asyncio.create_task(llm.wait_dead())
    said, took = await ends_under_load(llm, signal.SIGKILL, pids[victim])
    wanted = "the supervisor of the ranks ended" if victim == -1 else f"rank {victim} died (SIGKILL)"
    assert said == {wanted}
    assert took < 10
    assert {str(llm.dead), str(await waiting), str(await llm.wait_dead())} == {wanted}
    assert llm.pending == [0] * len(llm.pending)
    with pytest.raises(EngineDeadError, match="rank" if victim >= 0 else "supervisor"):
        async for _ in llm.stream([1]):
            pass
    assert living(pids) == []
    await asyncio.to_thread(llm.close)


@pytest.mark.parametrize("victim", [0, 2, -1])
def test_killed_process_ends_every_request(victim):
    asyncio.run(kill_under_load(victim, {**SETTINGS, "all2all_backend": "shm"}))


def test_killed_rank_while_others_wait_in_a_collective():
    asyncio.run(kill_under_load(1, {"tensor_parallel_size": 2, "data_parallel_size": 1, "dtype": "float32"}))


def test_a_rank_that_hangs_is_named_and_ended():
    async def run() -> None:
        settings = {**SETTINGS, "data_parallel_size": 2, "all2all_backend": "shm", "comm_timeout_s": 2}
        llm = AsyncLLM(folder("top1"), **settings)
        pids = [*llm.client.pids, llm.client.supervisor_pid]
        said, took = await ends_under_load(llm, signal.SIGSTOP, pids[1])
        (words,) = said
        assert re.fullmatch(r"rank 0: [\w ]+: rank\(s\) 1 did not arrive within 2 s", words)
        assert took < 10
        await asyncio.to_thread(llm.close)
        assert living(pids) == []

    asyncio.run(run())


def test_killed_front_end_leaves_nothing():
    script = (
        "import sys, time; from nonet import LLM\n"
        f"llm = LLM({folder('top1')!r}, **{SETTINGS!r})\n"
        "print(*llm.client.pids, llm.client.supervisor_pid, flush=True); time.sleep(60)"
    )
    shared = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(p) for p in process.stdout.readline().split()]
        assert len(pids) == 5
        process.kill()
    assert living(pids) == []
    assert set(os.listdir("/dev/shm")) <= shared


def test_close_ends_open_requests_and_every_process():
    async def run() -> None:
        llm = AsyncLLM(folder("top1"), **SETTINGS)
        pids = [*llm.client.pids, llm.client.supervisor_pid]
        stream = llm.stream([1, 2, 3], LONG)
        await anext(stream)
        await asyncio.to_thread(llm.close)
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in stream:
                pass
        assert "closed" in str(await llm.wait_dead())
        assert living(pids, within_s=1) == []

    asyncio.run(run())


def test_a_rank_that_cannot_start_says_why(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = Path(folder("top1"))
    (broken / "config.json").write_bytes((whole / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="truncated"):
        LLM(str(broken), dtype="float32", data_parallel_size=2, enable_expert_parallel=True)


def test_bad_settings_are_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        LLM(folder("top1"), blocksize=4)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 3.*nearest that works: 2 or 4"):
        LLM(folder("top1"), tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="moves CPU tensors|all2all_backend = 'shmm'.*did you mean 'shm'"):
        LLM(folder("top1"), data_parallel_size=2, enable_expert_parallel=True, all2all_backend="shmm")


def test_a_request_without_max_tokens_goes_on_as_far_as_the_cache_does():
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with LLM(folder("top1"), dtype="float32", num_blocks=8) as llm:
        for length in (2, 100, 128):
            out = llm.generate([[1] * length], params)[0].outputs[0]
            # the last token of an output needs no place in the cache
            assert (len(out.token_ids), out.finish_reason) == (128 + 1 - length, "length")
    with LLM(folder("top1"), dtype="float32", num_blocks=40) as llm:
        out = llm.generate([[1] * 500], params)[0].outputs[0]
        assert len(out.token_ids) == 512 - 500, "the model's length is the nearer bound"


def test_a_bad_request_harms_nobody():
    with LLM(folder("top1"), dtype="float32", num_blocks=8) as llm:
        with pytest.raises(RequestError, match="token ids are 0 to 63"):
            llm.generate([[1, 2], [64]])
        with pytest.raises(RequestError, match="^max_tokens = 400: with a prompt of 2 tokens exceeds .* cache of 128"):
            llm.generate([[1, 2]], SamplingParams(max_tokens=400))
        with pytest.raises(RequestError, match="^prompt = '129 tokens': exceeds the KV cache of 128 tokens"):
            llm.generate([[1] * 129], SamplingParams(max_tokens=1))
        with pytest.raises(RequestError, match="no tokenizer.json"):
            llm.generate("text")
        assert len(llm.generate([[1, 2]], SamplingParams(max_tokens=5))[0].outputs[0].token_ids) == 5
