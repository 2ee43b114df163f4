"""The equality rule: float32 greedy tokens equal the reference's; where one differs, the reference itself was torn.

A token may differ only where the reference's logits of the two tokens lie within GAP, and in at most one of 1,000
tokens. Used by tests and benchmarks; the reference is any function from token ids to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

GAP = 1e-4
PER_TOKENS = 1000

Reference = Callable[[list[int]], Tensor]  # token ids -> [len, vocabulary] logits, each row predicting the next token


@dataclass
class Equality:
    """What a comparison found. `torn` are (position, gap) of tokens that differ within the rule."""

    tokens: int = 0
    torn: list[tuple[int, float]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return len(self.torn) * PER_TOKENS <= max(self.tokens, PER_TOKENS)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {len(self.torn)} differ within the rule {self.torn}"


def check_equality(reference: Reference, results: Iterable[tuple[list[int], list[int]]]) -> Equality:
    """Hold (prompt, greedy output) pairs against the reference, token by token on the output's own prefix.

    Raises AssertionError at the first token that differs by more than GAP, or if too many differ.
    """
    found = Equality()
    for prompt, output in results:
        logits = reference(prompt + output)[len(prompt) - 1 : -1].float()
        best = logits.argmax(dim=-1).tolist()
        found.tokens += len(output)
        for i, (token, wanted) in enumerate(zip(output, best, strict=True)):
            if token != wanted:
                gap = float(logits[i, wanted] - logits[i, token])
                assert gap < GAP, f"output {i} after {len(prompt)} tokens is {token}, not {wanted}: gap {gap:.2e}"
                found.torn.append((i, gap))
    assert found.holds, f"too many differ: {found}"
    return found
