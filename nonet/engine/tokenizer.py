"""Text to tokens and back, by the `tokenizers` library. Used by the front end; ranks see only numbers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend

from nonet.errors import ModelError, RequestError


class Tokenizer:
    """A folder's tokenizer.json. Without one, prompts must be token ids and outputs carry no text."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "tokenizer.json"
        self.folder = folder
        self.backend: Backend | None = None
        self._lengths: dict[bool, dict[int, int]] = {False: {}, True: {}}
        if path.is_file():
            try:
                self.backend = Backend.from_file(str(path))
            except Exception as error:  # noqa: BLE001 - the library raises bare Exception
                raise ModelError(f"{path} is no tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids with the tokenizer's own special tokens. Raises RequestError if there is no tokenizer."""
        if self.backend is None:
            raise RequestError("prompt", text[:40], f"{self.folder} has no tokenizer.json; give prompt_token_ids")
        try:
            return list(self.backend.encode(text).ids)
        except TypeError as error:
            raise RequestError("prompt", text[:40], "is not valid Unicode (half of a surrogate pair?)") from error

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        if self.backend is None:
            return ""
        return str(self.backend.decode(tokens, skip_special_tokens=skip_special_tokens))

    def lengths(self, skip_special_tokens: bool) -> dict[int, int]:
        """Characters of single tokens, as far as they were asked for; streams share and fill it."""
        return self._lengths[skip_special_tokens]

    def stream(self, skip_special_tokens: bool) -> Detokenizer:
        return Detokenizer(self, skip_special_tokens)


class Detokenizer:
    """Text of one growing token sequence; never ends within a character.

    Decodes a window: the tokens whose text came out last, since a token's text may depend on the one before it, and
    those whose text is still held back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._shown_tokens, self._shown_text = 0, 0  # of the window
        self._known: dict[int, int] = tokenizer.lengths(skip_special_tokens)

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._window.append(token)
        text = self._held()
        if not text or text.endswith("\ufffd"):  # a character's bytes may go on in the next token
            return ""
        self._window = self._window[self._shown_tokens :]
        self._shown_tokens, self._shown_text = len(self._window), self._length()
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character show as the replacement character."""
        text = self._held()
        self._shown_tokens, self._shown_text = len(self._window), len(self._decode())
        return text

    def _length(self) -> int:
        """Characters of the window's text. Mostly it is one token, whose length alone never changes."""
        if len(self._window) > 1:
            return len(self._decode())
        token = self._window[0]
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = len(self._decode())
        return found

    def _held(self) -> str:
        return self._decode()[self._shown_text :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)
