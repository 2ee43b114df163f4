"""Structured outputs: masks from llguidance, rebuilt from a sequence's tokens, and grammars refused in one line."""

from __future__ import annotations

import asyncio
import json
import re
import sys

import numpy as np
import pytest

from nonet.config.checkpoint import find_folder
from nonet.engine import structured
from nonet.engine.structured import Grammars
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import RequestError
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams, StructuredOutputsParams

FOLDER = str(find_folder("nonet-tiny"))
VOCABULARY = 8192


def sequence(**what) -> Sequence:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**what))
    return Sequence("a", [5, 6], params, 200, seed=0)


def draw(grammars: Grammars, drawn: Sequence, seed: int) -> str:
    """A random text among those allowed, token by token until only an end is."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        allowed = np.flatnonzero(~grammars.forbidden(drawn, VOCABULARY))
        if list(allowed) == [0]:
            return Tokenizer(FOLDER).decode(drawn.outputs)
        drawn.tokens.append(int(rng.choice(allowed[allowed != 0])))
    raise AssertionError("it did not end")


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_allowed_matches(seed):
    grammars = Grammars(FOLDER, [0])
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", draw(grammars, sequence(regex="[0-9]{3}-[a-f]{2}"), seed))
    assert draw(grammars, sequence(choice=["red", "g.een"]), seed) in ("red", "g.een")
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"], "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }  # fmt: skip
    assert json.loads(draw(grammars, sequence(json=schema), seed))["a"] in (1, "x")
    assert draw(grammars, sequence(grammar='start: "a" "b"+ "c"'), seed)[:2] == "ab"


def test_a_forgotten_sequence_goes_on_where_it_was(monkeypatch):
    """Its state is that of its tokens: a mask is the same with and without what was kept."""
    kept, forgetful = Grammars(FOLDER, [0]), Grammars(FOLDER, [0])
    monkeypatch.setattr(structured, "_KEPT", 2)
    drawn = sequence(regex="(ab|cd)*e")
    rng = np.random.default_rng(1)
    for _ in range(10):
        mask = kept.forbidden(drawn, VOCABULARY)
        for _ in range(3):
            forgetful.forbidden(sequence(regex="x"), VOCABULARY)
        assert (forgetful.forbidden(drawn, VOCABULARY) == mask).all()
        allowed = np.flatnonzero(~mask)
        if list(allowed) == [0]:
            break
        drawn.tokens.append(int(rng.choice(allowed[allowed != 0])))
    assert len(forgetful._matchers) == 2


def test_after_the_end_only_an_end_is_allowed():
    grammars, drawn = Grammars(FOLDER, [0, 2]), sequence(choice=["a"])
    drawn.tokens.extend([67, 0])
    assert list(np.flatnonzero(~grammars.forbidden(drawn, VOCABULARY))) == [0, 2]


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ({"regex": "[0-9"}, "structured_outputs.regex"),
        ({"json": "{"}, "structured_outputs.json"),
        ({"json": {"type": "nothing"}}, "structured_outputs.json"),
        ({"grammar": "start: ("}, "structured_outputs.grammar"),
        ({"choice": ["x" * 300_000]}, "structured_outputs.choice"),
    ],
)
def test_a_bad_grammar_is_refused_in_one_line(what, field):
    with pytest.raises(RequestError) as raised:
        asyncio.run(structured.check(StructuredOutputsParams(**what)))
    assert raised.value.field == field
    assert "\n" not in str(raised.value)


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"needs llguidance; pip install 'nonet\[structured\]'"):
        asyncio.run(structured.check(StructuredOutputsParams(regex="a")))
