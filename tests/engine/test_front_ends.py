"""Several front-end processes on one engine: the same answers, and nothing of one that was killed stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from attached_process import Process
from pretend_ranks import eventually

from nonet import LLM, SamplingParams
from nonet.config import build_config
from nonet.engine.client import Client
from tests.processes import living

SETTINGS = {
    "data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "shm", "dtype": "float32",
    "num_blocks": 512,
}  # fmt: skip
PROMPTS = [[3 + 5 * i + j for j in range(4 + 7 * i)] for i in range(6)]
OPEN = {"do": "hold", "prompts": PROMPTS[:3]}


@pytest.fixture
def engine():
    with Client(build_config("nonet-tiny", **SETTINGS), front_ends=3) as client:
        yield client


def test_answers_are_those_of_a_lone_run(engine):
    with LLM("nonet-tiny", dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        alone = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    with Process(engine.attachment(1)) as one, Process(engine.attachment(2)) as two:
        for each in (one, two):
            each.say({"do": "generate", "prompts": PROMPTS, "max_tokens": 24})
        assert one.hear() == two.hear() == alone
        for each in (one, two):
            assert each.hear()[0] == 2
        assert engine.pending == [0, 0]
        assert all(process.process.wait(10) == 0 for process in (one, two))
    stats = engine.stats()
    assert all(s.tokens > 0 and s.free_blocks == s.num_blocks for s in stats)


def test_a_killed_front_end_frees_its_blocks_and_harms_nobody(engine):
    with Process(engine.attachment(1)) as one, Process(engine.attachment(2)) as two:
        one.say(OPEN)
        assert one.hear() == "all run"
        assert all(s.free_blocks < s.num_blocks for s in engine.stats())
        assert sum(engine.pending) > 0
        one.process.kill()
        eventually(lambda: engine.pending == [0, 0])
        eventually(lambda: all(s.free_blocks == s.num_blocks for s in engine.stats()))
        two.say({"do": "generate", "prompts": PROMPTS[:1], "max_tokens": 4})
        assert len(two.hear()[0]) == 4
        assert two.process.wait(10) == 0


@pytest.mark.parametrize("victim", [1, -1])
def test_a_killed_rank_ends_every_front_ends_streams(engine, victim):
    pids = [*engine.pids, engine.supervisor_pid]
    with Process(engine.attachment(1)) as one, Process(engine.attachment(2)) as two:
        for each in (one, two):
            each.say(OPEN)
            assert each.hear() == "all run"
        at = time.time()
        os.kill(pids[victim], signal.SIGKILL)
        wanted = "the supervisor of the ranks ended" if victim == -1 else "rank 1 died (SIGKILL)"
        for each in (one, two):
            said, when = each.hear()
            assert said == [wanted]
            assert when - at < 5  # well below a second where the machine is free
            assert each.process.wait(10) == 0
    assert living(pids) == []


def test_a_killed_starter_ends_ranks_and_front_ends():
    script = (
        "import json, sys, time; from nonet.config import build_config; from nonet.engine.client import Client\n"
        f"client = Client(build_config('nonet-tiny', **{SETTINGS!r}), front_ends=2)\n"
        "print(json.dumps([client.attachment(1), client.pids + [client.supervisor_pid]]), flush=True)\n"
        "time.sleep(600)"
    )
    shared = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as starter:
        attachment, pids = json.loads(starter.stdout.readline())
        with Process(attachment) as one:
            one.say(OPEN)
            assert one.hear() == "all run"
            starter.kill()
            said, _ = one.hear()
            assert said == ["the process that started the engine ended"]
            assert one.process.wait(10) == 0
    assert living(pids) == []
    assert set(os.listdir("/dev/shm")) <= shared
