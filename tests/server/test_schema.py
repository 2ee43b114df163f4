"""schemathesis against /openapi.json: whatever the schema allows or nearly allows, no answer is a 5xx."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode

from tests.server.live import Live, live

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


@pytest.fixture(scope="module")
def server():
    with live(data_parallel_size=2, num_blocks=512, max_model_len=64, max_request_bytes=200_000) as running:
        yield running


def no_server_error(server: Live, cases: int) -> dict[int, int]:
    """Run about so many cases, half of them against the schema; returns how many answers of each status there were."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    statuses: dict[int, int] = {}
    for operation in operations:
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation not in posts:
                continue
            share = cases // (2 * len(posts)) if operation in posts else 3

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=share, deadline=None, database=None, derandomize=True, suppress_health_check=_QUIET,
                phases=[Phase.generate],
            )  # fmt: skip
            def run(case: schemathesis.Case) -> None:
                response = case.call(timeout=60)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500, f"{case.as_curl_command()}: {response.text}"
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            run()
    return statuses


def test_a_hundred_cases(server):
    statuses = no_server_error(server, 100)
    assert sum(statuses.values()) >= 90
    assert statuses[200] > 5
    assert statuses[400] > 5
    assert server.all_free()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_cases(server):
    assert sum(no_server_error(server, 2100).values()) >= 2000
    assert server.all_free()
