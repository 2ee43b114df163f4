"""Work is spread evenly over data-parallel ranks: equal requests, requests of mixed lengths, pinned ones.

The front end gives a request to the rank with the fewest tokens outstanding. With pretend ranks, which take their turn
when the test says so, that is held to its bound at every step; one run over real ranks shows that it holds there.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque

import pytest
from pretend_ranks import PretendNode, Sink, eventually, request

from nonet import AsyncLLM, SamplingParams
from nonet.config import build_config
from nonet.engine import client as client_module
from nonet.engine import front_end as front_end_module
from nonet.engine import messages as m
from nonet.engine.client import Client
from nonet.engine.front_end import FrontEnd

DP = 4
RUNNING = 8  # sequences that a pretend rank has in a step
SHORT, LONG = 4, 120  # tokens of a request, 1:30


class Ranks:
    """Pretend ranks that decode: in a step each of the first sequences of every rank gets a token."""

    def __init__(self, node: PretendNode, front_ends: list[FrontEnd]) -> None:
        self._node, self.front_ends = node, front_ends
        self._queues: list[deque[list]] = [deque() for _ in range(DP)]  # [front end, name, prompt, output] still due
        self._submitted = [itertools.count() for _ in front_ends]
        self._ids = itertools.count()

    def submit(self, tokens: int, by: int = 0, dp_rank: int | None = None) -> int:
        """A request with so many tokens of prompt and output; the rank that got it."""
        front_end, prompt = self.front_ends[by], tokens // 2
        sent = request(str(next(self._ids)), prompt, tokens - prompt)
        rank = front_end.submit([sent], Sink(), dp_rank)
        name = m.sequence_name(front_end.number, next(self._submitted[by]))
        self._queues[rank].append([by, name, prompt, tokens - prompt])
        return rank

    def step(self) -> int:
        """One token for what runs; returns the most that one rank worked off, prompts included."""
        most = 0
        for rank, queue in enumerate(self._queues):
            came: dict[int, list[m.Chunk]] = {}
            worked = 0
            for entry in itertools.islice(queue, RUNNING):
                by, name, prompt, output = entry
                came.setdefault(by, []).append(m.Chunk(name, [0], finish_reason="length" if output == 1 else None))
                worked += prompt + 1
                entry[2:] = 0, output - 1
            self._queues[rank] = deque(entry for entry in queue if entry[3])
            for by, chunks in came.items():
                self._node.say(m.Chunks(rank, chunks), front_end=self.front_ends[by].number)
            most = max(most, worked)
        eventually(lambda: self.front_ends[0].pending == self.due())
        return most

    def due(self) -> list[int]:
        """What `pending` should be."""
        return [sum(prompt + output for *_, prompt, output in queue) for queue in self._queues]


@pytest.fixture
def start(monkeypatch):
    """start(front_ends) -> Ranks; closed at the end."""
    monkeypatch.setattr(client_module, "Node", PretendNode)
    monkeypatch.setattr(front_end_module, "_POLL_MS", 5)
    started: list[FrontEnd] = []

    def run(front_ends: int = 1) -> Ranks:
        client = Client(build_config("nonet-tiny", device="cpu", data_parallel_size=DP), front_ends)
        started.append(client)
        started.extend(Client.attach(client.attachment(i)) for i in range(1, front_ends))
        return Ranks(PretendNode.latest, list(started))

    yield run
    for each in reversed(started):
        each.close()


def mixed(count: int) -> list[int]:
    """Lengths of 1:30. Every fourth is the longest: taking turns over 4 ranks would give all of those to one."""
    rng = random.Random(3)
    return [LONG if i % DP == 0 else rng.choice((SHORT, rng.randrange(SHORT, LONG))) for i in range(count)]


@pytest.mark.parametrize("front_ends", [1, 3])
def test_equal_requests_at_once_are_shared_equally(start, front_ends):
    ranks = start(front_ends)
    taken = [ranks.submit(10, by=i % front_ends) for i in range(200)]
    assert [taken.count(rank) for rank in range(DP)] == [50] * DP


@pytest.mark.parametrize("front_ends", [1, 3])
def test_equal_requests_over_time_are_shared(start, front_ends):
    """Also where ranks have hardly anything to do, so that most choices are between ranks without work."""
    ranks = start(front_ends)
    taken = []
    for i in range(200):
        taken.append(ranks.submit(6, by=i % front_ends))
        if i % 2:
            ranks.step()
    assert min(taken.count(rank) for rank in range(DP)) > 200 / (DP + 1)


@pytest.mark.parametrize("front_ends", [1, 3])
def test_mixed_lengths_stay_within_twice(start, front_ends):
    """While requests arrive, the fullest rank has at most twice what the emptiest has.

    A rank gets a request only while it has the least, so it is then at most the longest request ahead of any other;
    what another works off in the step before its own next request comes on top. Once every rank has as much as both
    together, that is within a factor of 2. Before it, a single long request is more than twice nothing,
    whoever gets it.
    """
    ranks = start(front_ends)
    lengths, judged, worked = mixed(300), 0, 0
    for i, tokens in enumerate(lengths):
        ranks.submit(tokens, by=i % front_ends)
        least, most = min(ranks.due()), max(ranks.due())
        assert ranks.front_ends[-1].pending == ranks.due()
        assert most - least <= LONG + worked
        if least >= LONG + worked:
            judged += 1
            assert most <= 2 * least
        worked = max(worked, ranks.step()) if i % 2 else worked
    assert judged > 150, "there was hardly ever work for all"
    while any(ranks.due()):
        ranks.step()
    assert all(each.pending == [0] * DP for each in ranks.front_ends)


def test_a_pinned_rank_is_honoured_and_counted(start):
    """However much it has; what is not pinned goes round it until the others have as much."""
    ranks = start(2)
    assert [ranks.submit(50, by=i % 2, dp_rank=2) for i in range(10)] == [2] * 10
    free = [ranks.submit(50, by=i % 2) for i in range(30)]
    assert [free.count(rank) for rank in range(DP)] == [10, 10, 0, 10]
    assert ranks.submit(SHORT, dp_rank=0) == 0


# -- real ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    settings = {"enable_expert_parallel": True, "all2all_backend": "shm", "dtype": "float32"}
    running = AsyncLLM("nonet-tiny", data_parallel_size=DP, num_blocks=512, max_num_seqs=RUNNING, **settings)
    yield running
    running.close()


async def ask(llm: AsyncLLM, tokens: int, seed: int, rank: int | None = None) -> None:
    """A request with so many tokens, of which no two begin alike: nothing is found in the cache."""
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 8000) for _ in range(tokens // 2)]
    params = SamplingParams(temperature=0, max_tokens=tokens - len(prompt), ignore_eos=True)
    async for _ in llm.stream({"prompt_token_ids": prompt}, params, data_parallel_rank=rank):
        pass


def run_through(llm: AsyncLLM, before: list[int]) -> list[int]:
    """Tokens that each rank ran since."""
    return [s.tokens - b for s, b in zip(llm.client.stats(), before, strict=True)]


def test_each_real_rank_has_its_share_of_200_equal_requests(llm):
    before = [s.tokens for s in llm.client.stats()]

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(200):
                group.create_task(ask(llm, 8, seed))
                await asyncio.sleep(0.002)

    asyncio.run(all_of_them())
    shares = run_through(llm, before)
    assert min(shares) > sum(shares) / (DP + 1)
    assert llm.pending == [0] * DP


def test_mixed_lengths_stay_within_twice_on_real_ranks(llm):
    """They arrive faster than they are served. Judged after each arrival, as above."""
    judged = []

    async def arrive() -> None:
        async with asyncio.TaskGroup() as group:
            for seed, tokens in enumerate(mixed(80)):
                group.create_task(ask(llm, tokens, seed))
                await asyncio.sleep(0.005)
                pending = llm.pending
                if min(pending) >= 2 * LONG:
                    judged.append(max(pending) / min(pending))

    asyncio.run(arrive())
    assert len(judged) > 20, "there was hardly ever work for all"
    assert max(judged) <= 2
    assert llm.pending == [0] * DP


def test_a_pinned_real_rank_does_the_work(llm):
    before = [s.tokens for s in llm.client.stats()]

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(llm, 8, seed, rank=3) for seed in range(6)))

    asyncio.run(all_of_them())
    assert [rank for rank, tokens in enumerate(run_through(llm, before)) if tokens] == [3]
