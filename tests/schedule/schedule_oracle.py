"""A pretend engine around the scheduler: it draws random tokens and remembers what every cache place really holds.

The key and value of a position depend on the tokens up to it, so the pretend cache stores just these tokens. Whoever
reads a wrong, stale or overwritten place is found out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from nonet.schedule.blocks import Blocks, block_hash
from nonet.schedule.scheduler import Scheduled, Scheduler
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams


@dataclass
class Watched:
    """What the oracle knows of a sequence."""

    sequence: Sequence
    arrival: int
    target: int  # outputs after which it ends by itself
    epoch: int = -1  # preemptions when it was last admitted; -1: never
    computed: int = 0  # positions with keys and values since then
    first_hit: int = 0  # prompt tokens found at the first admission
    prompt_logprobs: list[int] = field(default_factory=list)


class PretendEngine:
    """Runs a scheduler step by step and checks every promise it makes."""

    def __init__(
        self,
        *,
        num_blocks: int = 8,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int = 1000,
        prefix_caching: bool = True,
        seed: int = 0,
    ) -> None:
        self.blocks = Blocks(num_blocks, block_size, prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=max_model_len
        )
        self.cache: list[tuple[int, ...] | None] = [None] * (num_blocks * block_size)
        self.watched: dict[str, Watched] = {}  # unfinished ones, in order of arrival
        self.finished: dict[str, Sequence] = {}
        self.random = random.Random(seed)
        self.arrivals = 0
        self.computed_tokens = 0

    def add(
        self, prompt: list[int], max_tokens: int = 4, target: int | None = None, prompt_logprobs: int | None = None
    ) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        sequence = Sequence(f"r{self.arrivals}", list(prompt), params, max_tokens, seed=0)
        self.scheduler.add(sequence)
        self.watched[sequence.request_id] = Watched(sequence, self.arrivals, min(target or max_tokens, max_tokens))
        self.arrivals += 1
        return sequence

    def abort(self, request_id: str) -> bool:
        known = self.watched.pop(request_id, None)
        found = self.scheduler.abort(request_id)
        assert found is (known.sequence if known else None)
        if found is not None:
            assert found.blocks == []
        return found is not None

    def step(self) -> list[Scheduled]:
        items = self.scheduler.schedule()
        self.check_step(items)
        findable = self.findable()  # what a start found is held by now, so it cannot have been taken away since
        for item in items:
            self.check_start(item, findable)
        for item in items:
            self.write(item)
        for item in items:
            self.read(item)
        self.scheduler.computed(items)
        for item in items:
            self.advance(item)
        self.check_books()
        return items

    def run(self, limit: int = 5000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.watched, "every sequence ends"
        assert self.blocks.num_free == self.blocks.num_blocks

    # -- what is checked -----------------------------------------------------------------------------------------

    def check_step(self, items: list[Scheduled]) -> None:
        scheduler = self.scheduler
        assert sum(item.count for item in items) <= scheduler.max_num_batched_tokens
        assert len(items) <= len(scheduler.running) <= scheduler.max_num_seqs
        assert all(item.count >= 1 and item.sequence in scheduler.running for item in items)
        assert len({item.sequence.request_id for item in items}) == len(items)
        counts = [item.count for item in items]
        assert counts == sorted(counts, key=lambda count: count > 1), "decoding sequences come first"
        if self.watched:
            assert items, "each step makes progress"
            oldest = next(iter(self.watched.values())).sequence
            assert scheduler.running[0] is oldest, "who came first is served first"
            assert any(item.sequence is oldest for item in items), "and is never left out"
        order = [self.watched[s.request_id].arrival for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order), "first come, first served, also after preemption"
        assert len(order) == len(self.watched)

    def check_start(self, item: Scheduled, findable: set[tuple[int, ...]]) -> None:
        """A (re)start begins behind the longest prefix found, any other chunk where the last one ended."""
        known, sequence = self.watched[item.sequence.request_id], item.sequence
        assert item.start + item.count <= len(sequence.tokens)
        if known.epoch == sequence.preemptions:
            assert item.start == known.computed, "every position once"
            return
        assert item.start == self.expected_hit(sequence, findable)
        if known.epoch < 0:
            known.first_hit = item.start
        assert sequence.num_cached == known.first_hit, "what a restart finds is its own work, no prefix hit"
        known.epoch = sequence.preemptions

    def expected_hit(self, sequence: Sequence, findable: set[tuple[int, ...]]) -> int:
        """Tokens of the longest known prefix in whole blocks, the last token left out."""
        if sequence.wants_prompt_logprobs:
            return 0
        size, hit = self.blocks.block_size, 0
        while hit + size < len(sequence.tokens) and tuple(sequence.tokens[: hit + size]) in findable:
            hit += size
        return hit

    def write(self, item: Scheduled) -> None:
        sequence = item.sequence
        for position in range(item.start, item.start + item.count):
            self.cache[self.place(sequence, position)] = tuple(sequence.tokens[: position + 1])
        self.computed_tokens += item.count
        self.watched[sequence.request_id].computed = item.start + item.count

    def read(self, item: Scheduled) -> None:
        """Attention would read all positions up to the chunk's end."""
        for position in range(item.start + item.count):
            seen = self.cache[self.place(item.sequence, position)]
            assert seen == tuple(item.sequence.tokens[: position + 1]), f"wrong key at position {position}"

    def place(self, sequence: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return sequence.blocks[position // size] * size + position % size

    def advance(self, item: Scheduled) -> None:
        """Sample, and finish what is done."""
        sequence, known = item.sequence, self.watched[item.sequence.request_id]
        if sequence.wants_prompt_logprobs:
            end = min(item.start + item.count, sequence.num_prompt - 1)
            assert item.start <= sequence.prompt_logprobs_done, "no position that is owed may be skipped"
            known.prompt_logprobs.extend(range(sequence.prompt_logprobs_done, end))
            sequence.prompt_logprobs_done = max(sequence.prompt_logprobs_done, end)
        if not item.samples:
            return
        sequence.tokens.append(self.random.randrange(3))
        if sequence.num_output >= known.target:
            self.scheduler.finish(sequence)
            self.finished[sequence.request_id] = self.watched.pop(sequence.request_id).sequence
            if sequence.params.prompt_logprobs is not None:
                assert known.prompt_logprobs == list(range(sequence.num_prompt - 1)), "each prompt position once"

    def findable(self) -> set[tuple[int, ...]]:
        """The prefixes that the cache offers, each checked against what its block really holds."""
        blocks, size, found = self.blocks, self.blocks.block_size, set()
        for name, block in blocks._block_of.items():
            assert blocks._hash_of[block] == name
            prefix = self.cache[block * size + size - 1]
            assert prefix is not None
            assert all(self.cache[block * size + i] == prefix[: len(prefix) - size + i + 1] for i in range(size))
            assert chain(prefix, size) == name, "a block is found by what it holds"
            found.add(prefix)
        return found

    def check_books(self) -> None:
        """References, free blocks and names agree with what the sequences hold."""
        blocks, scheduler = self.blocks, self.scheduler
        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for index, block in enumerate(sequence.blocks):
                holders.setdefault(block, []).append((sequence, index))
        assert all(not sequence.blocks and not sequence.num_computed for sequence in scheduler.waiting)
        assert blocks._refs == [len(holders.get(block, ())) for block in range(blocks.num_blocks)]
        assert set(blocks._free) == set(range(blocks.num_blocks)) - set(holders)
        assert blocks.num_free + len(holders) == blocks.num_blocks
        assert sum(name is not None for name in blocks._hash_of) == len(blocks._block_of)
        for block, users in holders.items():
            prefixes = {tuple(s.tokens[: (i + 1) * blocks.block_size]) for s, i in users}
            assert len(users) == 1 or len(prefixes) == 1, f"block {block} is shared by different prefixes"
        preemptions = [known.sequence.preemptions for known in self.watched.values()]
        assert sum(preemptions) <= scheduler.num_preemptions


def chain(prefix: tuple[int, ...], size: int) -> bytes:
    """The name of the block that ends a prefix of whole blocks."""
    name = b""
    for start in range(0, len(prefix), size):
        name = block_hash(name, prefix[start : start + size])
    return name
