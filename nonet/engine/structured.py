"""Structured outputs: which tokens may come next so that the text matches a JSON schema, a regex, choices or a grammar.

Used by the sampler (masks), and by the server to refuse a bad grammar before it is sent. The grammar engine is
llguidance, an extra, imported when first asked for. A sequence's state is derived from its tokens, so nothing is lost
when it is forgotten.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nonet.errors import RequestError
from nonet.schedule.sequence import Sequence
from nonet.types import StructuredOutputsParams

log = logging.getLogger("nonet")
_KEPT = 512  # matchers; one that was dropped is made anew from its sequence's tokens
_FIELD = "structured_outputs"
_LONGEST = 1 << 18  # characters of a grammar: a rank reads it between two steps


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(_FIELD, "given", "needs llguidance; pip install 'nonet[structured]'") from None
    return llguidance


def grammar_of(params: StructuredOutputsParams) -> str:
    """The grammar in llguidance's form. Raises RequestError if it is not installed or the form is wrong."""
    matcher = _llguidance().LLMatcher
    if params.json_object:
        return str(matcher.grammar_from_json_schema({"type": "object"}))
    if params.json is not None:
        try:
            schema = json.loads(params.json) if isinstance(params.json, str) else params.json
            return str(matcher.grammar_from_json_schema(json.dumps(schema)))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{_FIELD}.json", "given", f"is no JSON schema: {error}") from None
    if params.regex is not None:
        return str(matcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        return str(matcher.grammar_from_regex("|".join(re.escape(choice) for choice in params.choice)))
    return str(matcher.grammar_from_lark(params.grammar or ""))


async def check(params: StructuredOutputsParams) -> None:
    """Raise RequestError if there is no such grammar. Beside the event loop: large ones take a second."""
    grammar = grammar_of(params)
    kind = next(name for name in params.__struct_fields__ if getattr(params, name) not in (None, False))
    shown = str(getattr(params, kind))[:80]
    if len(grammar) > _LONGEST:
        raise RequestError(f"{_FIELD}.{kind}", shown, f"is too large; use at most {_LONGEST} characters")
    is_error, words = await asyncio.to_thread(_llguidance().LLMatcher.validate_grammar_with_warnings, grammar)
    if is_error:
        why = " ".join(str(words[0]).split())[:300]
        raise RequestError(f"{_FIELD}.{kind}", shown, f"is not accepted: {why}")


class Grammars:
    """The matchers of one rank's sequences over one tokenizer."""

    def __init__(self, tokenizer_folder: str, eos_token_ids: Seq[int]) -> None:
        self._path = Path(tokenizer_folder) / "tokenizer.json"
        self._eos = tuple(eos_token_ids)
        self._tokenizer: Any = None
        self._matchers: OrderedDict[int, _Matcher] = OrderedDict()  # by the sequence's identity

    def forbidden(self, sequence: Sequence, vocab_size: int) -> npt.NDArray[np.bool_]:
        """[vocab_size] True for tokens that may not come next. Once the text is complete, only an end may."""
        found = self._matchers.pop(id(sequence), None)
        if found is None or found.sequence is not sequence:
            found = _Matcher(sequence, self._new(sequence.params.structured_outputs, vocab_size))
        self._matchers[id(sequence)] = found
        if len(self._matchers) > _KEPT:
            self._matchers.popitem(last=False)
        return found.forbidden(vocab_size, self._eos)

    def _new(self, params: StructuredOutputsParams | None, vocab_size: int) -> Any:
        assert params is not None
        llguidance = _llguidance()
        if self._tokenizer is None:
            text = self._path.read_text(encoding="utf-8")
            eos = list(self._eos) or None
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos)
        return llguidance.LLMatcher(self._tokenizer, grammar_of(params), log_level=0)


class _Matcher:
    """llguidance's matcher of one sequence, and how many of its outputs it has seen."""

    def __init__(self, sequence: Sequence, matcher: Any) -> None:
        self.sequence, self._matcher, self._seen = sequence, matcher, 0

    def forbidden(self, vocab_size: int, eos: Seq[int]) -> npt.NDArray[np.bool_]:
        outputs = self.sequence.outputs
        for token in outputs[self._seen :]:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._seen = len(outputs)
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        if not self._matcher.is_stopped() and not self._matcher.is_error():
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed[:] = np.unpackbits(mask, bitorder="little")[:vocab_size]
        if self._matcher.is_error():
            log.warning("a structured output ends early: %s", " ".join(self._matcher.get_error().split())[:300])
        if not allowed.any():
            allowed[[token for token in eos if token < vocab_size]] = True
        return ~allowed if allowed.any() else allowed  # no end token at all: nothing can be forbidden any more
