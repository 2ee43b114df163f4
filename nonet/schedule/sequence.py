"""One sequence: its tokens, how many of them are computed, and the KV blocks it holds. Owned by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from nonet.types import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated for it. `tokens[:num_computed]` have keys and values in `blocks`."""

    request_id: str
    tokens: list[int]
    params: SamplingParams
    max_tokens: int  # outputs allowed, the model's length considered
    seed: int
    num_prompt: int = 0
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, chained
    num_committed: int = 0  # blocks that the prefix cache was told of
    prompt_logprobs_done: int = 0  # prompt positions whose log probabilities went out
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Prompt positions whose log probabilities are still owed: they must be computed, not taken from a cache."""
        return self.params.prompt_logprobs is not None and self.prompt_logprobs_done < self.num_prompt - 1
