"""Text to tokens and back, by the `tokenizers` library, or by a checkpoint's own Python code if that is trusted.

Used by front ends and benchmarks; ranks see only numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

from nonet.config.checkpoint import needs_code
from nonet.errors import ModelError, RequestError


class Tokenizer:
    """A folder's tokenizer.json. Without one, prompts must be token ids and outputs carry no text.

    A folder that has Python code in its place is run if `trust_remote_code`, else refused with ConfigError.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False) -> None:
        path = Path(folder) / "tokenizer.json"
        self.folder = folder
        self.backend: Backend | PythonBackend | None = None
        self._lengths: dict[bool, dict[int, int]] = {False: {}, True: {}}
        if path.is_file():
            try:
                self.backend = Backend.from_file(str(path))
            except Exception as error:  # noqa: BLE001 - the library raises bare Exception
                raise ModelError(f"{path} is no tokenizer: {error}") from error
        elif needs_code(Path(folder), trust_remote_code):
            self.backend = PythonBackend(_run_code(folder))

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

    def check_structured(self) -> None:
        """Raise RequestError if no grammar can hold outputs: ranks need tokenizer.json for that, and run no code."""
        if isinstance(self.backend, PythonBackend):
            raise RequestError("structured_outputs", "given", f"{self.folder} has no tokenizer.json, which they need")

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


def _run_code(folder: str) -> Any:
    """The transformers tokenizer that a folder's own code makes. Raises ModelError if it cannot be made."""
    from transformers import AutoTokenizer, PretrainedConfig

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(folder).absolute()),
            trust_remote_code=True,
            local_files_only=True,  # the code that was read is what runs, not another repository's
            config=PretrainedConfig(),  # the model's may be code too, and is not needed
        )
    except Exception as error:  # noqa: BLE001 - anything may come from code of others
        words = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ModelError(f"the Python tokenizer of {folder} does not load: {words}") from error


class Encoded(NamedTuple):
    ids: list[int]


class PythonBackend:
    """A transformers tokenizer with the face of the `tokenizers` library's, as far as that is used."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.model_max_length = 1 << 40  # prompts are measured elsewhere; it would warn
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, str | None] = {}
        # Pieces of GPT-2's table for bytes, as byte-level BPE in Python has it under this name; others are not known.
        self.decoder = "ByteLevel" if hasattr(tokenizer, "byte_decoder") else "Python"

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Raises TypeError for text that is not Unicode, as the library does, RequestError where the code fails."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TypeError(str(error)) from error
        options = {} if add_special_tokens else {"add_special_tokens": False}  # classes may have a way without options
        try:
            return Encoded(list(self._tokenizer.encode(text, **options)))
        except Exception as error:  # noqa: BLE001 - code of others
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise RequestError("prompt", text[:40], f"the model's own tokenizer fails: {words}") from error

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        hidden = self._special if skip_special_tokens else frozenset()
        shown = [token for token in tokens if token not in hidden and self.id_to_token(token) is not None]
        if not shown:
            return ""
        plain = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}  # streams need text
        return str(self._tokenizer.decode(shown, skip_special_tokens=False, **plain))  # that no later token changes

    def id_to_token(self, token: int) -> str | None:
        """The vocabulary's piece; None for a token that it does not have."""
        if token not in self._pieces:
            try:
                piece = self._tokenizer.convert_ids_to_tokens(token)
            except Exception:  # noqa: BLE001 - classes differ in what they raise for a token they lack
                piece = None
            self._pieces[token] = piece if isinstance(piece, str) else None
        return self._pieces[token]

    def get_vocab_size(self) -> int:
        return len(self._tokenizer)

    def get_added_tokens_decoder(self) -> dict[int, str | None]:
        """Special tokens and others that were added to the vocabulary."""
        return {token: self.id_to_token(token) for token in self._special | set(self._tokenizer.added_tokens_decoder)}
