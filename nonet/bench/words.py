"""What a tokenizer means to a benchmark: random prompts of a given length, and how long a text is.

Used by `bench.datasets`, and to count what a server generated if it does not say so itself.
"""

from __future__ import annotations

import numpy as np

from nonet.engine.tokenizer import Tokenizer
from nonet.errors import ConfigError

_TRIES = 8  # to make a text of exactly as many tokens
_MOST_PROBED = 20_000


class Words:
    """A vocabulary, from a tokenizer or, for prompts of token ids only, from its size."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> None:
        self._backend = tokenizer.backend if tokenizer is not None else None
        self._size = vocab_size
        self._usable: np.ndarray | None = None

    @property
    def can_count(self) -> bool:
        """Whether there is a tokenizer."""
        return self._backend is not None

    def count(self, text: str) -> int:
        """Tokens of a text without special ones; -1 without a tokenizer."""
        return -1 if self._backend is None else len(self._backend.encode(text, add_special_tokens=False).ids)

    def ids(self, rng: np.random.Generator, length: int) -> list[int]:
        """Random tokens, none of them special. Raises ConfigError if there is neither a tokenizer nor a size."""
        if self._usable is None:
            self._usable = self._tokens()
        return [int(token) for token in rng.choice(self._usable, size=length)]

    def text(self, ids: list[int]) -> tuple[str, int]:
        """A text of about those tokens that has exactly as many, if that can be had; and how many it has.

        Decoding and encoding again may join or split tokens, so ends are cut and filled until the count is right.
        """
        assert self._backend is not None
        wanted, now = len(ids), list(ids)
        text, got = "", -1
        for _ in range(_TRIES):
            text = self._backend.decode(now, skip_special_tokens=False)
            now = list(self._backend.encode(text, add_special_tokens=False).ids)
            got = len(now)
            if got == wanted:
                break
            now = now[:wanted] + ids[: max(0, wanted - got)]
        return text, got

    def _tokens(self) -> np.ndarray:
        """Tokens to draw from: where there is a tokenizer whole words, which stay one token inside a text."""
        if self._backend is None:
            if self._size is None:
                raise ConfigError("--tokenizer", None, "random prompts need one; give a folder with tokenizer.json")
            return np.arange(self._size)
        special = set(self._backend.get_added_tokens_decoder())
        size = min(self._backend.get_vocab_size(), self._size or 1 << 31)
        plain = np.array([token for token in range(size) if token not in special])
        step = max(1, len(plain) // _MOST_PROBED)
        whole = [token for token in plain[::step] if self._stays(int(token))]
        return np.array(whole) if len(whole) >= min(256, len(plain) // 4) else plain

    def _stays(self, token: int) -> bool:
        assert self._backend is not None
        text = self._backend.decode([token], skip_special_tokens=False)
        return text[:1] == " " and text[1:].isalpha() and self.count(text) == 1
