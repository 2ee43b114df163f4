"""The arithmetic of a run, against values worked out by hand."""

from __future__ import annotations

import pytest

from nonet.bench import metrics
from nonet.bench.metrics import Outcome
from nonet.errors import ConfigError

# Two requests, of 3 tokens and of 1, and a failed one.
THREE = Outcome(prompt_len=10, output_len=3, start=0.0, ttft=0.1, itls=[0.2, 0.4], latency=0.7)
ONE = Outcome(prompt_len=20, output_len=1, start=0.5, ttft=0.3, itls=[], latency=0.3)
FAILED = Outcome(prompt_len=40, output_len=5, start=0.0, ttft=0.2, itls=[0.1], latency=9.0, error="HTTP 500")


def test_tpot_leaves_out_the_first_token():
    assert THREE.tpot == pytest.approx((0.7 - 0.1) / 2)
    assert ONE.tpot is None
    assert Outcome(output_len=4, latency=1.0).tpot is None  # no first token


def test_totals_count_only_what_succeeded():
    out = metrics.summary([THREE, FAILED, ONE], 2.0)
    assert {key: out[key] for key in list(out)[:11]} == {
        "duration": 2.0, "completed": 2, "failed": 1, "total_input_tokens": 30, "total_output_tokens": 4,
        "request_throughput": 1.0, "request_goodput": None, "output_throughput": 2.0, "total_token_throughput": 17.0,
        "max_output_tokens_per_s": 4.0, "max_concurrent_requests": 2,
    }  # fmt: skip


def test_statistics_of_each_metric():
    names = ["ttft", "tpot", "itl", "e2el"]
    out = metrics.summary([THREE, FAILED, ONE], 2.0, metrics=names, percentiles=[50, 99, 99.9])
    assert out["mean_ttft_ms"] == pytest.approx(200)
    assert out["median_ttft_ms"] == pytest.approx(200)
    assert out["std_ttft_ms"] == pytest.approx(100)
    assert out["p99_ttft_ms"] == pytest.approx(100 + 0.99 * 200)
    assert out["p99.9_ttft_ms"] == pytest.approx(100 + 0.999 * 200)
    assert out["mean_tpot_ms"] == out["p50_tpot_ms"] == pytest.approx(300)
    assert out["std_tpot_ms"] == 0
    assert out["mean_itl_ms"] == pytest.approx(300)
    assert out["p50_itl_ms"] == pytest.approx(300)
    assert out["mean_e2el_ms"] == pytest.approx(500)


def test_only_the_metrics_asked_for_are_there():
    out = metrics.summary([THREE], 1.0, metrics=["e2el"])
    assert sorted(key for key in out if key.endswith("_ms")) == [
        "mean_e2el_ms", "median_e2el_ms", "p99_e2el_ms", "std_e2el_ms",
    ]  # fmt: skip


def test_no_success_at_all_is_zeros():
    out = metrics.summary([FAILED], 2.0)
    assert (out["completed"], out["failed"], out["output_throughput"]) == (0, 1, 0)
    assert out["mean_ttft_ms"] == out["p99_itl_ms"] == 0


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 300}, 2),
        ({"ttft": 299}, 1),
        ({"ttft": 99}, 0),
        ({"tpot": 299}, 1),  # the request of one token has no TPOT to miss
        ({"ttft": 250, "tpot": 301}, 1),
        ({"e2el": 700}, 2),
        ({"e2el": 699}, 1),
        ({"ttft": 300, "tpot": 300.001, "e2el": 700}, 2),
    ],
)
def test_goodput_counts_requests_that_meet_every_objective(limits, good):
    assert metrics.summary([THREE, ONE, FAILED], 2.0, goodput=limits)["request_goodput"] == good / 2


def test_peak_tokens_go_by_whole_seconds_from_the_first_request():
    """Arrivals at 0.5, 0.9 and 1.1 s; an arrival of a request with more tokens than arrivals brings several."""
    first = Outcome(output_len=2, start=100.0, ttft=0.5, itls=[0.4], latency=0.9)
    second = Outcome(output_len=4, start=100.6, ttft=0.5, itls=[], latency=0.5)
    assert metrics.peak_tokens([first]) == 2
    assert metrics.peak_tokens([first, second]) == 4


def test_peak_concurrency_touching_ends_do_not_overlap():
    a, b, c = (Outcome(start=s, latency=t) for s, t in ((0.0, 1.0), (1.0, 1.0), (1.5, 1.0)))
    assert metrics.peak_concurrency([a, b]) == 1
    assert metrics.peak_concurrency([a, b, c]) == 2
    assert metrics.peak_concurrency([]) == 0


def test_what_the_user_asks_for():
    assert metrics.metrics_from("ttft, e2el") == ["ttft", "e2el"]
    assert metrics.percentiles_from("50,99.9") == [50, 99.9]
    assert metrics.goodput_from(["ttft:200", "e2el:5e3"]) == {"ttft": 200, "e2el": 5000}


@pytest.mark.parametrize(
    ("call", "words", "message"),
    [
        (metrics.metrics_from, "tftt", "--percentile-metrics = 'tftt': is no metric; did you mean 'ttft'?"),
        (metrics.percentiles_from, "50,x", "--metric-percentiles = 'x': use numbers from 0 to 100, as 50,90,99"),
        (metrics.percentiles_from, "101", "--metric-percentiles = '101': use numbers from 0 to 100, as 50,90,99"),
        (metrics.goodput_from, ["itl:5"], "--goodput = 'itl:5': use metric:ms, as ttft:200; known: e2el, tpot, ttft"),
        (metrics.goodput_from, ["ttft:-1"], "--goodput = 'ttft:-1': use a number of ms, 0 or more, as ttft:200"),
        (metrics.goodput_from, ["ttft:nan"], "--goodput = 'ttft:nan': use a number of ms, 0 or more, as ttft:200"),
    ],
)
def test_mistakes(call, words, message):
    with pytest.raises(ConfigError) as caught:
        call(words)
    assert str(caught.value) == message
