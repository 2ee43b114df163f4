"""Continuous batching: what runs in the next step, under a token budget, with preemption by recomputation.

One scheduler a data-parallel rank, driven by the engine's loop. Running sequences come first (a decoding one needs
one token, a half-done prompt its next chunk), then waiting ones as the budget and the free blocks allow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nonet.errors import CapacityError, RequestError
from nonet.schedule.blocks import Blocks
from nonet.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of a sequence, from position `start`; `samples` if its next token is drawn after them."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Owns the sequences and the block books of one data-parallel rank."""

    def __init__(self, blocks: Blocks, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError or CapacityError if it can never run; it is not kept then."""
        if not sequence.tokens:
            raise RequestError("prompt", [], "must hold at least one token")
        if sequence.num_prompt >= self.max_model_len:
            raise RequestError(
                "prompt", f"{sequence.num_prompt} tokens", f"must be shorter than max_model_len ({self.max_model_len})"
            )
        room = self.blocks.num_blocks * self.blocks.block_size
        if sequence.num_prompt + sequence.max_tokens > room + 1:
            raise CapacityError(
                f"prompt of {sequence.num_prompt} + max_tokens of {sequence.max_tokens} exceeds the KV cache of {room} "
                f"tokens; lower max_tokens or raise kv_cache_memory_bytes"
            )
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """Forget a sequence, running or waiting; None if it is not here (any more)."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    self.blocks.release(sequence)
                    return sequence
        return None

    def schedule(self) -> list[Scheduled]:
        """What runs now: decoding sequences first, then chunks of prompts. Empty if nothing can."""
        budget = self.max_num_batched_tokens
        chosen: list[Scheduled] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            count = min(len(sequence.tokens) - sequence.num_computed, budget)
            while not self.blocks.grow(sequence, sequence.num_computed + count):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                chosen.append(Scheduled(sequence, sequence.num_computed, count))
                budget -= count
                index += 1
        if not preempted:
            self._admit(chosen, budget)
        chosen.sort(key=lambda item: item.count > 1)  # stable: decoding first
        return chosen

    def _preempt_last(self) -> Sequence:
        """Take the blocks of the youngest running sequence; it starts over from its tokens."""
        victim = self.running.pop()
        self.blocks.release(victim)
        victim.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def _admit(self, chosen: list[Scheduled], budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            prefix = self.blocks.cached_prefix(sequence)
            start = len(prefix) * self.blocks.block_size
            count = min(len(sequence.tokens) - start, budget)
            blocks = -(-(start + count) // self.blocks.block_size) - len(prefix)
            if blocks > self.blocks.num_takeable(prefix):
                return
            self.blocks.admit(sequence, prefix)
            grown = self.blocks.grow(sequence, start + count)
            assert grown, "counted above"
            if not sequence.preemptions:
                sequence.num_cached = start
            self.running.append(self.waiting.popleft())
            chosen.append(Scheduled(sequence, start, count))
            budget -= count

    def computed(self, items: list[Scheduled]) -> None:
        """The step ran: these tokens have keys and values now."""
        for item in items:
            item.sequence.num_computed = item.start + item.count
            self.blocks.commit(item.sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence is done: its blocks are free, and findable by their prefix."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
