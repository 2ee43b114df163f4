"""The bytes a token stands for, which its text cannot always show: half of a character has no text.

Used for `bytes` in log probabilities. Reads the tokenizer's own kind: byte-level BPE (GPT-2's table), or sentencepiece
with bytes as <0xE4>. Of a tokenizer in Python that is neither, only the text is known.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer as Backend

from nonet.engine.tokenizer import PythonBackend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _printable() -> dict[str, int]:
    """GPT-2's table: bytes that print stand for themselves, the others for characters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


class Pieces:
    """One tokenizer's tokens as bytes."""

    def __init__(self, backend: Backend | PythonBackend | None) -> None:
        self._backend = backend
        decoder = repr(backend.decoder) if backend is not None else ""
        self._table = _printable() if "ByteLevel" in decoder else None
        self._added = set(backend.get_added_tokens_decoder()) if backend is not None else set()

    def bytes_of(self, token: int, text: str) -> list[int]:
        """`text` is the token's text, and gives the bytes where the vocabulary does not."""
        piece = self._backend.id_to_token(token) if self._backend is not None else None
        if piece is None:
            return list(text.encode())
        if token in self._added:
            return list(piece.encode())
        if self._table is not None:
            found = [self._table.get(character) for character in piece]
            return [byte for byte in found if byte is not None] if None not in found else list(text.encode())
        if byte := _BYTE.fullmatch(piece):
            return [int(byte[1], 16)]
        if isinstance(self._backend, PythonBackend):
            return list(text.encode())
        return list(piece.replace("\u2581", " ").encode())
