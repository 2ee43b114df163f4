"""The bytes of tokens, for the kinds of tokenizers there are: put together they are the text's."""

from __future__ import annotations

import pytest
from small_tokenizers import END, TEXT, byte_fallback, single_bytes, trained

from nonet.engine.tokenizer import Tokenizer
from nonet.server.pieces import Pieces


@pytest.mark.parametrize("make", [trained, single_bytes, byte_fallback])
def test_bytes_of_tokens_make_the_text(make):
    tokenizer: Tokenizer = make()
    pieces = Pieces(tokenizer.backend)
    for line in TEXT.strip().splitlines():
        tokens = tokenizer.encode(line)
        found = bytes(b for t in tokens for b in pieces.bytes_of(t, tokenizer.decode([t], False)))
        assert found.decode().strip() == tokenizer.decode(tokens).strip()


def test_a_special_token_is_its_name():
    assert bytes(Pieces(trained().backend).bytes_of(0, END)).decode() == END


def test_without_a_tokenizer_the_text_decides(tmp_path):
    assert Pieces(Tokenizer(str(tmp_path)).backend).bytes_of(5, "\u00fc") == [0xC3, 0xBC]
