"""Results from chunks: streamed text, stop strings and stop tokens, several sequences, log probabilities."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import END, TEXT, single_bytes, trained

from nonet.engine.messages import Chunk
from nonet.engine.output import CompletionState, RequestState
from nonet.types import Logprob, SamplingParams

BAD = "\ufffd"


def completion(tokenizer=None, **params) -> CompletionState:
    return CompletionState(0, SamplingParams(max_tokens=None, **params), tokenizer or single_bytes())


def chunk(tokens, finish: str | None = None, stop_token: int | None = None, **more) -> Chunk:
    tokens = single_bytes().encode(tokens) if isinstance(tokens, str) else tokens
    return Chunk("r", list(tokens), finish_reason=finish, stop_token=stop_token, **more)


def stream(state: CompletionState, text: str) -> list[str]:
    """The text after each of its bytes, one token each, until a stop string ends it."""
    seen = []
    for token in single_bytes().encode(text):
        ended = state.add(chunk([token]))
        seen.append(state.output.text)
        if ended:
            break
    return seen


# -- streaming, by example --------------------------------------------------------------------------------------------


def test_text_grows_by_whole_characters():
    state = completion()
    assert stream(state, "aä🙂b") == ["a", "a", "aä", "aä", "aä", "aä", "aä🙂", "aä🙂b"]
    assert not state.finished


def test_a_torn_character_shows_when_the_sequence_ends():
    state = completion()
    tokens = single_bytes().encode("a🙂")
    assert not state.add(chunk(tokens[:3]))
    assert state.output.text == "a"
    assert not state.add(chunk([], "length"))
    assert (state.output.text, state.output.finish_reason, state.output.stop_reason) == (f"a{BAD}", "length", None)


def test_what_may_become_a_stop_string_is_held_back():
    state = completion(stop=["stop"])
    assert stream(state, "a stone") == ["", "", "", "a", "a ", "a s", "a st"]
    state.add(chunk("", "length"))
    assert state.output.text == "a stone"


def test_a_stop_string_longer_than_the_text_so_far_holds_all_of_it():
    state = completion(stop=["a very long stop string"])
    assert set(stream(state, "a very long")) == {""}


def test_nothing_is_held_back_where_the_stop_string_will_be_shown_anyway():
    state = completion(stop=["stop"], include_stop_str_in_output=True)
    assert stream(state, "a sto") == ["a", "a ", "a s", "a st", "a sto"]


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_a_stop_string_over_several_tokens_ends_the_text(include, text):
    state = completion(stop=["two"], include_stop_str_in_output=include)
    tokens = single_bytes().encode("one two three")
    ends = [state.add(chunk([token])) for token in tokens[:7]]
    assert ends == [False] * 6 + [True], "the engine is told to end it"
    out = state.output
    assert (out.text, out.finish_reason, out.stop_reason) == (text, "stop", "two")
    assert out.token_ids == tokens[:7]


def test_a_stop_string_within_one_chunk_ends_the_tokens_there():
    state = completion(stop=["two"])
    assert state.add(chunk("one two three"))
    assert state.output.text == "one "
    assert state.output.token_ids == single_bytes().encode("one two")


def test_a_stop_string_within_one_token_cuts_it():
    tokenizer = trained()
    (token,) = tokenizer.encode(" the")
    assert tokenizer.decode([token]) == " the"
    state = completion(tokenizer, stop=["h"])
    assert state.add(chunk([token]))
    assert state.output.text == " t"
    state = completion(tokenizer, stop=["h"], include_stop_str_in_output=True)
    assert state.add(chunk([token]))
    assert state.output.text == " th"


def test_the_engine_that_has_ended_is_not_told_to():
    state = completion(stop=["b"])
    assert not state.add(chunk("ab", "length"))
    assert (state.output.text, state.output.finish_reason, state.output.stop_reason) == ("a", "stop", "b")


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (["two", "three"], "one ", "two"),
        (["three", "two"], "one ", "two"),
        (["wo", "two"], "one ", "two"),  # both complete with the same token: the earlier start
        (["e t", "ne"], "o", "ne"),
        (["zzz", "one two three"], None, None),
    ],
)
def test_of_several_stop_strings_the_first_to_complete_ends_the_text(stops, text, reason):
    state = completion(stop=stops)
    stream(state, "one two thre")
    assert state.output.stop_reason == reason
    assert state.output.text == (text if text is not None else "")


def test_a_stop_string_may_appear_with_the_last_flush():
    state = completion(stop=[f"a{BAD}"])
    state.add(chunk(single_bytes().encode("xa🙂")[:-1]))
    assert not state.finished
    state.add(chunk([], "length"))
    assert (state.output.text, state.output.finish_reason, state.output.stop_reason) == ("x", "stop", f"a{BAD}")


def test_min_tokens_lets_early_stop_strings_pass():
    state = completion(stop=["b"], min_tokens=4)
    assert stream(state, "abca")[-1] == "abca"
    assert not state.finished
    assert state.add(chunk("b"))
    assert state.output.text == "abca"


def test_a_stop_string_that_passed_stays_whatever_other_ones_there_are():
    """A longer one makes us look further back, but what came before min_tokens was not a stop."""
    state = completion(stop=["b", "zzzzzzzz"], min_tokens=3)
    stream(state, "abca")
    assert not state.finished
    state.add(chunk("", "length"))
    assert state.output.text == "abca"


def test_a_stop_string_that_completes_with_min_tokens_counts():
    state = completion(stop=["bc"], min_tokens=3)
    assert stream(state, "abc")[-1] == "a"
    assert state.finished


# -- ends that the engine found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
def test_the_text_of_the_end_token_is_not_shown(skip):
    state = completion(skip_special_tokens=skip)
    assert not state.add(chunk([*single_bytes().encode("hi"), 0], "stop"))
    assert (state.output.text, state.output.finish_reason, state.output.stop_reason) == ("hi", "stop", None)
    assert state.output.token_ids[-1] == 0


def test_the_end_token_is_shown_when_asked_for():
    state = completion(skip_special_tokens=False, include_stop_str_in_output=True)
    state.add(chunk([*single_bytes().encode("hi"), 0], "stop"))
    assert state.output.text == f"hi{END}"


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi.")])
def test_the_text_of_a_stop_token_is_shown_only_when_asked_for(include, text):
    tokens = single_bytes().encode("hi.")
    state = completion(stop_token_ids=[tokens[-1]], include_stop_str_in_output=include)
    assert not state.add(chunk(tokens, "stop", stop_token=tokens[-1]))
    out = state.output
    assert (out.text, out.finish_reason, out.stop_reason, out.token_ids) == (text, "stop", tokens[-1], tokens)


def test_only_the_last_of_equal_stop_tokens_is_hidden():
    tokens = single_bytes().encode("h.i.")
    state = completion(stop_token_ids=[tokens[-1]], min_tokens=3)
    state.add(chunk(tokens, "stop", stop_token=tokens[-1]))
    assert state.output.text == "h.i"


def test_the_last_token_before_the_length_limit_is_shown():
    state = completion()
    state.add(chunk("hi.", "length"))
    assert (state.output.text, state.output.finish_reason) == ("hi.", "length")


# -- streaming, by property -------------------------------------------------------------------------------------------


def visible(tokenizer, tokens: list[int], count: int, skip: bool) -> str:
    """The text after `count` tokens as far as it cannot change any more."""
    for end in range(count, 0, -1):
        text = tokenizer.decode(tokens[:end], skip)
        if text and not text.endswith(BAD):
            return text
    return ""


def reference(tokenizer, tokens: list[int], p: SamplingParams) -> tuple[str, str, str | None, int]:
    """(text, finish reason, stop reason, tokens taken in) by trying every token count and every stop string anew."""
    steps = [visible(tokenizer, tokens, n, p.skip_special_tokens) for n in range(len(tokens) + 1)]
    steps.append(tokenizer.decode(tokens, p.skip_special_tokens))  # the flush
    for n, (before, text) in enumerate(zip(steps, steps[1:], strict=False), 1):
        count = min(n, len(tokens))
        if count < p.min_tokens:
            continue
        ends = [
            (end - len(stop), stop)
            for end in range(len(before) + 1, len(text) + 1)
            for stop in p.stop
            if text[:end].endswith(stop)
        ]
        if ends:
            start, stop = min(ends)
            return text[: start + len(stop) * p.include_stop_str_in_output], "stop", stop, count
    return steps[-1], "length", None, len(tokens)


@st.composite
def runs(draw):
    """(tokenizer, tokens, chunk lengths, parameters): text or any tokens, with stop strings taken from it."""
    tokenizer = draw(st.sampled_from([trained(), single_bytes()]))
    if draw(st.booleans()):
        start = draw(st.integers(0, len(TEXT) - 60))
        tokens = tokenizer.encode(TEXT[start : start + draw(st.integers(1, 50))])
    else:
        size = tokenizer.backend.get_vocab_size()
        tokens = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=25))
    text = tokenizer.decode(tokens) or "x"
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 8)).map(lambda s: text[s[0] : s[0] + s[1]])
    params = SamplingParams(
        max_tokens=None,
        stop=draw(st.lists(st.one_of(spans, spans, st.text("aeä🙂 ", min_size=1, max_size=4)), max_size=3)),
        min_tokens=draw(st.sampled_from([0, 0, 1, 3, 10])),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
    )
    return tokenizer, tokens, draw(st.lists(st.integers(1, 4), min_size=1, max_size=30)), params


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs())
def test_streamed_text_is_always_a_prefix_of_the_final_text(run):
    tokenizer, tokens, lengths, params = run
    state = CompletionState(0, params, tokenizer)
    seen, told_to_end, at = [], False, 0
    while at < len(tokens) and not state.finished:
        part = tokens[at : at + lengths[at % len(lengths)]]
        at += len(part)
        told_to_end = state.add(chunk(part, "length" if at == len(tokens) else None))
        seen.append(state.output.text)
    out = state.output
    text, reason, stop, count = reference(tokenizer, tokens, params)
    assert (out.text, out.finish_reason, out.stop_reason) == (text, reason, stop)
    assert out.token_ids == tokens[:count]
    assert told_to_end == (reason == "stop" and at < len(tokens))
    assert all(out.text.startswith(shown) for shown in seen)
    if not params.include_stop_str_in_output and not params.min_tokens:
        assert not any(stop in out.text for stop in params.stop)


# -- whole requests ---------------------------------------------------------------------------------------------------


def request(**params) -> RequestState:
    return RequestState("q", "hi", [5, 6], SamplingParams(max_tokens=None, **params), single_bytes())


def test_one_sequence_has_the_name_of_its_request():
    state = request()
    assert state.ids == ["q"]
    assert not state.add(Chunk("q", single_bytes().encode("yes"), finish_reason="length", num_cached=1))
    result = state.result()
    assert (result.request_id, result.prompt, result.prompt_token_ids, result.finished) == ("q", "hi", [5, 6], True)
    assert [c.text for c in result.outputs] == ["yes"]
    assert (result.num_cached_tokens, result.prompt_logprobs) == (1, None)
    assert (result.outputs[0].logprobs, result.outputs[0].cumulative_logprob) == (None, None)


def test_several_sequences_come_in_any_order_and_end_one_by_one():
    state = request(n=3, stop=["x"])
    assert state.ids == ["q#0", "q#1", "q#2"]
    encode = single_bytes().encode
    assert not state.add(Chunk("q#2", encode("c"), num_cached=4))
    assert state.add(Chunk("q#0", encode("ax")))
    assert not state.add(Chunk("q#1", encode("b"), finish_reason="length"))
    assert not state.finished
    assert not state.add(Chunk("q#0", encode("late"))), "sent before the abort arrived: not taken in"
    assert not state.add(Chunk("q#2", encode("c"), finish_reason="length"))
    result = state.result()
    assert result.finished
    assert [(c.index, c.text, c.finish_reason) for c in result.outputs] == [
        (0, "a", "stop"), (1, "b", "length"), (2, "cc", "length"),
    ]  # fmt: skip
    assert result.num_cached_tokens == 4


def test_logprobs_are_named_and_summed():
    state = request(logprobs=1)
    a, b = single_bytes().encode("ab")
    state.add(Chunk("q", [a], logprobs=[[(a, -0.5, 1)]]))
    state.add(Chunk("q", [b, a], logprobs=[[(b, -1.5, 2), (a, -0.25, 1)], [(a, -2.0, 1)]]))
    out = state.result().outputs[0]
    assert out.cumulative_logprob == -4.0
    assert out.logprobs == [
        {a: Logprob(-0.5, 1, "a")},
        {b: Logprob(-1.5, 2, "b"), a: Logprob(-0.25, 1, "a")},
        {a: Logprob(-2.0, 1, "a")},
    ]


def test_logprobs_end_with_the_tokens_where_a_stop_string_cuts_a_chunk():
    state = request(logprobs=0, stop=["b"])
    tokens = single_bytes().encode("abc")
    assert state.add(Chunk("q", tokens, logprobs=[[(t, -1.0, 1)] for t in tokens]))
    out = state.result().outputs[0]
    assert (len(out.token_ids), len(out.logprobs), out.cumulative_logprob) == (2, 2, -2.0)


def test_logprobs_of_zero_tokens_are_empty_not_missing():
    out = request(logprobs=3).result().outputs[0]
    assert (out.logprobs, out.cumulative_logprob) == ([], 0.0)


def test_prompt_logprobs_start_with_none_and_come_in_parts():
    state = request(prompt_logprobs=1, n=2)
    a, b = single_bytes().encode("ab")
    assert state.result().prompt_logprobs == [None]
    state.add(Chunk("q#0", [], prompt_logprobs=[[(a, -1.0, 3), (b, -0.5, 1)]]))
    state.add(Chunk("q#1", [], prompt_logprobs=[[(a, -1.0, 3)]]))  # the same prompt: told once
    state.add(Chunk("q#0", [b], prompt_logprobs=[[(b, -2.0, 2)]]))
    assert state.result().prompt_logprobs == [
        None,
        {a: Logprob(-1.0, 3, "a"), b: Logprob(-0.5, 1, "b")},
        {b: Logprob(-2.0, 2, "b")},
    ]
    assert state.result().outputs[0].token_ids == [b]
