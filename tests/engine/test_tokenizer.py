"""Text to tokens and back, and the streaming way back: no piece ends within a character, none is lost or doubled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import END, START, TEXT, byte_fallback, single_bytes, trained

from nonet.engine.tokenizer import Tokenizer
from nonet.errors import ModelError, RequestError

BAD = "\ufffd"  # what bytes that are no character show as
MAKERS = [trained, single_bytes, byte_fallback]
alphabet = st.sampled_from(sorted(set(TEXT)))
texts = st.one_of(st.text(alphabet, max_size=40), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))


def pieces(tokenizer: Tokenizer, tokens: list[int], skip: bool = True) -> list[str]:
    """One piece a token, and what the flush brings."""
    stream = tokenizer.stream(skip)
    return [*(stream.add(token) for token in tokens), stream.flush()]


def test_training_gave_merges_within_and_across_characters():
    tokenizer = trained()
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT.encode())
    split = [t for t in range(600) if BAD in tokenizer.decode([t])]
    assert len(split) > 128, "single bytes and merges of some"
    assert any(len(tokenizer.encode(c)) > 1 for c in "🙂🚀")


@pytest.mark.parametrize("maker", MAKERS)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_pieces_of_a_text_make_the_text(maker, text):
    tokenizer = maker()
    tokens = tokenizer.encode(text)
    got = pieces(tokenizer, tokens)
    assert "".join(got) == tokenizer.decode(tokens)
    if BAD not in text:
        assert not any(BAD in piece for piece in got)
        assert got[-1] == "", "whole characters leave nothing for the end"
    if maker is not byte_fallback:  # which puts a space before the text and takes it away again
        assert "".join(got) == text


@pytest.mark.parametrize("maker", [trained, single_bytes])
@settings(max_examples=150, deadline=None)
@given(picks=st.lists(st.integers(0, 10_000), max_size=30), skip=st.booleans())
def test_pieces_of_any_tokens_make_the_full_decode(maker, picks, skip):
    """Also where bytes do not make characters: all that is shown stays true, and the end shows the rest."""
    tokenizer = maker()
    tokens = [pick % tokenizer.backend.get_vocab_size() for pick in picks]
    whole, got = tokenizer.decode(tokens, skip), pieces(tokenizer, tokens, skip)
    assert "".join(got) == whole
    shown = ""
    for count, piece in enumerate(got[:-1], 1):
        shown += piece
        assert whole.startswith(shown)
        if piece:
            assert shown == tokenizer.decode(tokens[:count], skip)
            assert not shown.endswith(BAD), "it could still become a character"


@settings(max_examples=150, deadline=None)
@given(picks=st.lists(st.integers(0, 10_000), max_size=30), skip=st.booleans())
def test_byte_fallback_survives_any_tokens(picks, skip):
    """There, a bad byte changes how earlier ones decode; what was shown stays, and nothing breaks."""
    tokenizer = byte_fallback()
    tokens = [pick % tokenizer.backend.get_vocab_size() for pick in picks]
    got = pieces(tokenizer, tokens, skip)
    assert len(got) == len(tokens) + 1
    assert not any(piece.endswith(BAD) for piece in got[:-1])
    if BAD not in tokenizer.decode(tokens, skip):
        assert "".join(got) == tokenizer.decode(tokens, skip)


def test_a_character_appears_with_its_last_byte():
    tokenizer = single_bytes()
    tokens = tokenizer.encode("aä🙂")
    assert pieces(tokenizer, tokens) == ["a", "", "ä", "", "", "", "🙂", ""]


def test_a_torn_character_shows_at_the_end_only():
    tokenizer = single_bytes()
    tokens = tokenizer.encode("a🙂")[:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", BAD]


def test_bytes_that_never_were_a_character_show_once_that_is_certain():
    tokenizer = single_bytes()
    torn, letter = tokenizer.encode("🙂")[:2], tokenizer.encode("b")
    assert pieces(tokenizer, torn + letter) == ["", "", f"{BAD}b", ""]


def test_flush_gives_the_rest_once():
    tokenizer = single_bytes()
    stream = tokenizer.stream(True)
    assert stream.add(tokenizer.encode("ä")[0]) == ""
    assert (stream.flush(), stream.flush()) == (BAD, "")


def test_long_outputs_do_not_make_a_token_dearer():
    stream, tokens = trained().stream(True), trained().encode(TEXT * 3)
    widest = 0
    for token in tokens:
        stream.add(token)
        widest = max(widest, len(stream._window))
    assert widest < 24 < len(tokens), "tokens decoded for one more"


@pytest.mark.parametrize("maker", [trained, single_bytes])
def test_special_tokens_show_only_when_wanted(maker):
    tokenizer = maker()
    tokens = [1, *tokenizer.encode("hi"), 0]
    assert tokenizer.decode(tokens) == "".join(pieces(tokenizer, tokens)) == "hi"
    assert tokenizer.decode(tokens, False) == "".join(pieces(tokenizer, tokens, False)) == f"{START}hi{END}"


def test_a_skipped_token_within_a_character_does_not_tear_it():
    tokenizer = single_bytes()
    first, second = tokenizer.encode("ä")
    assert pieces(tokenizer, [first, 0, second]) == ["", "", "ä", ""]


def test_spaces_at_word_marks_are_kept_but_for_the_first():
    tokenizer = byte_fallback()
    tokens = tokenizer.encode("the a the")
    assert tokenizer.decode(tokens) == "the a the"
    assert pieces(tokenizer, tokens) == ["the", " a", " the", ""]
    assert pieces(tokenizer, [1, *tokens]) == ["", "the", " a", " the", ""], "a skipped token is no text"


def test_words_in_the_prompt_that_name_special_tokens_become_them():
    assert trained().encode(f"a{END}")[-1] == 0


def test_without_a_tokenizer_prompts_must_be_tokens_and_there_is_no_text(tmp_path):
    tokenizer = Tokenizer(str(tmp_path))
    with pytest.raises(RequestError, match=r"has no tokenizer.json; give prompt_token_ids"):
        tokenizer.encode("hello")
    assert tokenizer.decode([1, 2]) == ""
    assert pieces(tokenizer, [1, 2]) == ["", "", ""]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_a_model_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer.json is no tokenizer"):
        Tokenizer(str(tmp_path))


def test_half_a_surrogate_pair_is_a_request_error():
    with pytest.raises(RequestError, match="not valid Unicode"):
        trained().encode("a\ud83d")


def test_tokens_the_tokenizer_does_not_know_are_no_text():
    tokenizer = trained()
    assert tokenizer.decode([100_000]) == ""
    assert pieces(tokenizer, [100_000, *tokenizer.encode("x")]) == ["", "x", ""]
