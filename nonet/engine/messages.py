"""What the front end and the ranks say to each other, and ranks among themselves once a step. msgpack by msgspec.

Written and read by `front_end`, `client`, `core` and `lockstep`. Nothing here is a tensor.
"""

from __future__ import annotations

import msgspec

from nonet.types import SamplingParams

TokenLogprob = tuple[int, float, int]  # token id, log probability, rank among all tokens (1 = most likely)


class _Message(msgspec.Struct, tag=True, array_like=True):
    pass


def sequence_name(front_end: int, number: int) -> str:
    """A sequence's `request_id` between processes: never used twice, whatever ids users give."""
    return f"{front_end}.{number}"


def front_end_of(name: str) -> int:
    """The front end that submitted the sequence of this name, and gets what it brings."""
    return int(name[: name.index(".")])


class Add(_Message):
    """A sequence to run. `seed` and `max_tokens` are settled by the front end."""

    request_id: str
    tokens: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int


class Abort(_Message):
    request_ids: list[str]


class Forget(_Message):
    """A front end is gone: whatever it submitted is dropped, and nothing more is sent to it."""

    front_end: int


class GetStats(_Message):
    """Asks a rank for a Stats; `reset_load` starts its load counts anew."""

    front_end: int
    number: int
    reset_load: bool = False


class Stop(_Message):
    """All ranks leave together at the next step."""


class Ready(_Message):
    rank: int
    pid: int
    num_blocks: int
    bytes_read: int  # of the checkpoint, by this rank


class Failed(_Message):
    """A rank cannot go on. `kind` is the error's class name, `arguments` rebuild it."""

    rank: int
    kind: str
    text: str
    arguments: list[str]


class Chunk(_Message):
    """New tokens of one sequence, and why it ended if it did."""

    request_id: str
    tokens: list[int]
    logprobs: list[list[TokenLogprob]] | None = None  # for each token: itself first, then the most likely
    finish_reason: str | None = None
    stop_token: int | None = None
    num_cached: int = 0
    prompt_logprobs: list[list[TokenLogprob]] | None = None  # the next prompt positions, from the second token on


class Chunks(_Message):
    """What one step of one rank brought."""

    rank: int
    chunks: list[Chunk]


class Refused(_Message):
    """A sequence that can never run: a RequestError (field, value, remedy) or a CapacityError (text)."""

    request_id: str
    kind: str
    arguments: list[str]


class Stats(_Message):
    """One rank's counters since start (load: since the last reset)."""

    number: int
    rank: int
    dp_rank: int
    steps: int
    tokens: int  # run through the model by this data-parallel rank
    max_step_tokens: int
    sleeps: int
    collectives: int  # entered by this rank in the expert-parallel group
    free_blocks: int
    num_blocks: int
    preemptions: int
    load: list[list[int]]  # [MoE layer][expert]: this rank's own tokens
    cpu_seconds: float
    running: int  # sequences of this rank's scheduler that have blocks
    waiting: int  # and those that have none yet, or lost them


ToRank = Add | Abort | Forget | GetStats | Stop
FromRank = Ready | Failed | Chunks | Refused | Stats


class StepBatch(msgspec.Struct, array_like=True):
    """One step of one data-parallel rank, as its scheduler chose it; its tensor-parallel peers run the same."""

    tokens: list[int] = []
    starts: list[int] = []  # position of each sequence's first new token
    counts: list[int] = []  # new tokens of each sequence; those with one come first
    blocks: list[list[int]] = []
    logit_rows: list[int] = []


class StepState(msgspec.Struct, array_like=True):
    """What a rank tells all others before a step."""

    tokens: int
    stop: bool
    batch: bytes = b""  # a StepBatch, for tensor-parallel peers
    load: bytes = b""  # in some steps: tokens by layer and expert since the last time, int64 [L, E]
