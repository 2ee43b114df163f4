"""Sampling parameters: what is refused, that whatever is accepted reaches a rank, and errors that keep their fields."""

from __future__ import annotations

import pickle

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet import errors
from nonet.errors import ConfigError, NonetError, RequestError, nearest
from nonet.types import MAX_LOGPROBS, SamplingParams


def test_defaults_are_the_fields():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.seed, p.stop, p.stop_token_ids, p.logprobs, p.prompt_logprobs) == (None, [], [], None, None)
    assert (p.ignore_eos, p.include_stop_str_in_output, p.skip_special_tokens) == (False, False, True)


def test_lists_are_not_shared():
    assert SamplingParams().stop is not SamplingParams().stop


@pytest.mark.parametrize(
    ("given_", "stop"), [("a", ["a"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), (None, []), ([], [])]
)
def test_one_or_many_stop_strings(given_, stop):
    assert SamplingParams(stop=given_).stop == stop


def test_no_stop_tokens_in_either_way():
    assert SamplingParams(stop_token_ids=None).stop_token_ids == SamplingParams(stop_token_ids=()).stop_token_ids == []


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (0.0, True), (1e-6, True), (1e-5, False), (0.01, False), (1, False)]
)
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


BAD = [
    ("n", 0), ("n", 1.0), ("n", True), ("n", None), ("temperature", -0.1), ("temperature", 101), ("temperature", "hot"),
    ("temperature", float("nan")), ("temperature", None), ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
    ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1), ("presence_penalty", 2.1),
    ("presence_penalty", -2.1), ("frequency_penalty", 3), ("repetition_penalty", 0.0),
    ("repetition_penalty", float("inf")), ("seed", 1 << 63), ("seed", -(1 << 63) - 1), ("seed", 1.5), ("seed", "1"),
    ("max_tokens", 0), ("max_tokens", 2.0), ("max_tokens", 1 << 70), ("min_tokens", -1), ("min_tokens", 17),
    ("stop", 5), ("stop", [""]), ("stop", ["a", 3]), ("stop", ""), ("stop", ["\ud800"]), ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]), ("stop_token_ids", [1.0]), ("stop_token_ids", 7), ("stop_token_ids", [1 << 70]),
    ("ignore_eos", 1), ("ignore_eos", None), ("logprobs", -1), ("logprobs", MAX_LOGPROBS + 1), ("logprobs", True),
    ("prompt_logprobs", -1), ("prompt_logprobs", MAX_LOGPROBS + 1), ("include_stop_str_in_output", "yes"),
    ("skip_special_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda item: repr(item)[:30])
def test_a_bad_value_is_refused_with_its_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


GOOD = [
    ("n", 5), ("temperature", 100), ("temperature", 2), ("top_p", 1), ("top_p", 1e-9), ("top_k", -1),
    ("top_k", 1 << 40),
    ("min_p", 1.0), ("presence_penalty", -2), ("frequency_penalty", 2.0), ("repetition_penalty", 1e-3), ("seed", 0),
    ("seed", -(1 << 63)), ("seed", (1 << 63) - 1), ("max_tokens", None), ("max_tokens", 1), ("min_tokens", 16),
    ("stop_token_ids", [0, 151_935]), ("logprobs", 0), ("logprobs", MAX_LOGPROBS), ("prompt_logprobs", 0),
    ("stop", ["🙂", "\n\n"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), GOOD, ids=lambda item: repr(item)[:30])
def test_a_good_value_reaches_the_rank_as_it_is(name, value):
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_min_tokens_may_be_anything_without_a_limit():
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000
    with pytest.raises(RequestError, match="^min_tokens = 3: use at most max_tokens$"):
        SamplingParams(max_tokens=2, min_tokens=3)


def test_unknown_parameters_are_errors():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(msgspec.ValidationError, match="best_of"):
        msgspec.json.decode(b'{"best_of": 2}', type=SamplingParams)


def test_parameters_are_frozen():
    with pytest.raises(AttributeError, match="immutable"):
        SamplingParams().n = 2


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=2),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=3),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(given_=st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__), values, max_size=3))
def test_whatever_is_accepted_can_be_sent_and_read(given_):
    """A rank that cannot read a request would end; so a wrong type must not get that far."""
    try:
        params = SamplingParams(**given_)
    except RequestError as error:
        params = None
        refused = error
    if params is None:
        assert refused.field in given_ or refused.field == "min_tokens"
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("block_size", 0, "use 1 or more"),
        RequestError("n", -1, "use 1 or more"),
        errors.CommTimeout("step exchange", 3.0, (1, 2)),
        errors.CapacityError("no room"),
        errors.EngineDeadError("rank 3 died"),
    ],
)
def test_errors_keep_their_words_through_pickle(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_errors_say_field_value_and_remedy_and_have_codes():
    assert str(ConfigError("a", "x", "use y")) == "a = 'x': use y"
    codes = {kind.__name__: (kind.exit_code, kind.http_status) for kind in subclasses(NonetError)}
    assert codes["ConfigError"] == (2, 400)
    assert codes["RequestError"] == (2, 400)
    assert codes["CapacityError"][1] == 503
    assert codes["ModelError"][0] == 3
    assert codes["CommError"] == codes["CommTimeout"] == (4, 503)
    assert codes["EngineDeadError"] == (5, 503)


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))


def test_a_timeout_names_who_is_missing():
    assert str(errors.CommTimeout("x", 3.0, (1, 2))) == "x: rank(s) 1, 2 did not arrive within 3 s"
    assert str(errors.CommTimeout("x", 3.0)) == "x: a rank did not arrive within 3 s"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("naiv", "did you mean 'naive'?"), ("shm2", "did you mean 'shm'?"), ("pplx", "known: naive, shm")],
)
def test_nearest(name, remedy):
    assert nearest(name, ["shm", "naive"]) == remedy
