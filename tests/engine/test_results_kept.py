"""What a stream hands out may be kept: later chunks change nothing in it, and keeping it costs no copy."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import pytest
from small_tokenizers import single_bytes

from nonet.engine.messages import Chunk
from nonet.engine.output import RequestState
from nonet.engine.prefix import Prefix
from nonet.types import SamplingParams


def request(**params) -> RequestState:
    return RequestState("q", "hi", [5, 6], SamplingParams(max_tokens=None, **params), single_bytes())


def test_what_was_handed_out_stays_as_it_was():
    state = request(logprobs=0, prompt_logprobs=0)
    tokens = single_bytes().encode("abc")
    seen = []
    for i, token in enumerate(tokens):
        entries = [[(token, -1.0, 1)]]
        of_prompt = entries if i < 2 else None
        finish = "length" if token == tokens[-1] else None
        state.add(Chunk("q", [token], logprobs=entries, prompt_logprobs=of_prompt, finish_reason=finish))
        seen.append(state.result())
    assert [list(r.outputs[0].token_ids) for r in seen] == [tokens[:1], tokens[:2], tokens]
    assert [len(r.outputs[0].logprobs) for r in seen] == [1, 2, 3]
    assert [r.outputs[0].text for r in seen] == ["a", "ab", "abc"]
    assert [len(r.prompt_logprobs) for r in seen] == [2, 3, 3]
    assert [r.finished for r in seen] == [False, False, True]
    assert [r.outputs[0].cumulative_logprob for r in seen] == [-1.0, -2.0, -3.0]


def test_a_finished_output_holds_plain_lists():
    state = request(logprobs=0)
    (token,) = single_bytes().encode("a")
    state.add(Chunk("q", [token], logprobs=[[(token, -1.0, 1)]], finish_reason="length"))
    out = state.result().outputs[0]
    assert (type(out.token_ids), type(out.logprobs)) == (list, list)


def test_a_result_of_a_long_stream_costs_what_one_of_a_short_one_does():
    """A copy of the tokens for each token would cost the square of the stream's length."""
    state = request()
    (token,) = single_bytes().encode("a")
    cost = []
    for length in (100, 50_000):
        state.completions[0].output.token_ids.extend([token] * (length - len(state.completions[0].output.token_ids)))
        tracemalloc.start()
        kept = state.result()
        cost.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(kept.outputs[0].token_ids) == length
    assert cost[1] < cost[0] + 1000


def test_a_prefix_reads_like_a_list():
    items = [4, 5, 6, 7]
    prefix = Prefix(items)
    items.append(8)
    assert prefix == [4, 5, 6, 7]
    assert [prefix] == [[4, 5, 6, 7]]
    assert prefix == Prefix(items[:4])
    assert prefix != items
    assert prefix != (4, 5, 6, 7)
    assert (len(prefix), prefix[0], prefix[-1], list(prefix)) == (4, 4, 7, [4, 5, 6, 7])
    for part in (slice(1, None), slice(-2, None), slice(None, None, -1), slice(2, 100), slice(3, 0, -2)):
        assert prefix[part] == [4, 5, 6, 7][part]
    assert ([1] + prefix, prefix + [1]) == ([1, 4, 5, 6, 7], [4, 5, 6, 7, 1])
    assert (7 in prefix, 8 in prefix, prefix.index(6), list(reversed(prefix))) == (True, False, 2, [7, 6, 5, 4])
    assert repr(prefix) == "[4, 5, 6, 7]"
    assert pickle.loads(pickle.dumps(prefix)) == copy.deepcopy(prefix) == [4, 5, 6, 7]
    with pytest.raises(IndexError):
        prefix[4]
    with pytest.raises(TypeError):
        hash(prefix)
