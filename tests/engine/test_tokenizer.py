"""Text to tokens and back, and the streaming way back: no piece ends within a character, none is lost or doubled."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import folder
from small_tokenizers import END, START, TEXT, byte_fallback, single_bytes, trained

from nonet import LLM, SamplingParams
from nonet.bench.words import Words
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import ConfigError, ModelError, RequestError
from nonet.server.pieces import Pieces
from nonet.types import StructuredOutputsParams

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


# -- a tokenizer that is Python code in the checkpoint's folder --------------------------------------------------------

CODE = """
from transformers import PreTrainedTokenizer

BYTES = [*range(32, 127), *"ä漢🙂".encode()]  # token 0 ends a text, the others are these


class Bytes(PreTrainedTokenizer):
    def __init__(self, **settings):
        self.pieces = ["<end>"] + [f"<0x{byte:02X}>" for byte in BYTES]
        super().__init__(eos_token="<end>", **settings)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: token for token, piece in enumerate(self.pieces)}

    def _tokenize(self, text, **settings):
        return [f"<0x{byte:02X}>" for byte in text.encode()]

    def _convert_token_to_id(self, piece):
        return self.pieces.index(piece)

    def _convert_id_to_token(self, token):
        return self.pieces[token]

    def convert_tokens_to_string(self, pieces):
        found = b"".join(p.encode() if p == "<end>" else bytes([int(p[3:5], 16)]) for p in pieces)
        return found.decode(errors="replace")

    def build_inputs_with_special_tokens(self, tokens, pair=None):
        return [0, *tokens]
"""
WORDS = "a ä, 漢🙂!"


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A small model whose tokenizer is such code. What transformers keeps of it lies in the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = tmp_path / "model"
    shutil.copytree(folder("odd22"), model)
    (model / "tokenization_bytes.py").write_text(CODE)
    named = {"auto_map": {"AutoTokenizer": ["tokenization_bytes.Bytes", None]}, "tokenizer_class": "Bytes"}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    yield model
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_code_that_is_trusted_reads_and_writes_text(with_code):
    tokenizer = Tokenizer(str(with_code), trust_remote_code=True)
    tokens = tokenizer.encode(WORDS)
    assert tokens[0] == 0
    assert len(tokens) == 1 + len(WORDS.encode()), "a token a byte behind the special one"
    assert tokenizer.backend.encode(WORDS, add_special_tokens=False).ids == tokens[1:]
    assert (tokenizer.decode(tokens), tokenizer.decode(tokens, False)) == (WORDS, f"<end>{WORDS}")
    assert pieces(tokenizer, tokens) == ["", "a", " ", "", "ä", ",", " ", "", "", "漢", "", "", "", "🙂", "!", ""]
    assert pieces(tokenizer, tokens[:-2]) == ["", "a", " ", "", "ä", ",", " ", "", "", "漢", "", "", "", BAD]
    assert pieces(tokenizer, [130, tokens[1], 5000]) == ["", "a", "", ""], "tokens it does not know are no text"
    assert (tokenizer.backend.get_vocab_size(), tokenizer.backend.id_to_token(5000)) == (105, None)
    assert tokenizer.backend.get_added_tokens_decoder() == {0: "<end>"}
    assert [Pieces(tokenizer.backend).bytes_of(token, BAD) for token in tokens[3:5]] == [[0xC3], [0xA4]]
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(RequestError, match="prompt = 'é': the model's own tokenizer fails: ValueError: '<0xA9>'"):
        tokenizer.encode("é")


def test_benchmarks_make_texts_with_it(with_code):
    words = Words(Tokenizer(str(with_code), trust_remote_code=True))
    assert words.count(WORDS) == len(WORDS.encode())
    plain = [token for token in words.ids(np.random.default_rng(0), 200) if token < 96]
    text, count = words.text(plain)
    assert len(text) == count == len(plain) > 100


def test_a_model_with_code_for_a_tokenizer_is_served_only_if_that_is_trusted(with_code):
    settings = dict(dtype="float32", num_blocks=64)
    remedy = r"trust_remote_code = False: the tokenizer of .* is Python code; .* --trust-remote-code$"
    with pytest.raises(ConfigError, match=remedy):
        LLM(str(with_code), **settings)
    assert not (with_code.parent / "kept").exists()
    with LLM(str(with_code), **settings, trust_remote_code=True) as llm:
        sampled = SamplingParams(max_tokens=60, seed=3, logit_bias=dict.fromkeys(range(96, 105), 3.0))
        (result,) = llm.generate(WORDS, sampled, use_tqdm=False)
        held = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        with pytest.raises(RequestError, match="structured_outputs = 'given': .* has no tokenizer.json, which they"):
            llm.generate(WORDS, held, use_tqdm=False)
        tokens, text = list(result.outputs[0].token_ids), result.outputs[0].text
        assert (result.prompt, result.prompt_token_ids) == (WORDS, llm.tokenizer.encode(WORDS))
        assert text == llm.tokenizer.decode(tokens) == "".join(pieces(llm.tokenizer, tokens))
        assert not any(piece.endswith(BAD) for piece in pieces(llm.tokenizer, tokens)[:-1])


def test_code_beside_a_tokenizer_json_is_never_run(with_code):
    (with_code / "tokenization_bytes.py").write_text("raise RuntimeError('it ran')")
    with pytest.raises(ModelError, match=r"the Python tokenizer of .* does not load: RuntimeError: it ran"):
        Tokenizer(str(with_code), trust_remote_code=True)
    trained().backend.save(str(with_code / "tokenizer.json"))
    for trusted in (False, True):
        tokenizer = Tokenizer(str(with_code), trusted)
        assert tokenizer.encode(WORDS) == trained().encode(WORDS)
        tokenizer.check_structured()


def test_code_needs_transformers(with_code, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"trust_remote_code = True: .*; pip install transformers$"):
        Tokenizer(str(with_code), trust_remote_code=True)


def test_a_configuration_of_a_tokenizer_that_names_no_code_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Bytes", "auto_map": {}}')
    for trusted in (False, True):
        tokenizer = Tokenizer(str(tmp_path), trusted)
        assert tokenizer.backend is None
        tokenizer.check_structured()
