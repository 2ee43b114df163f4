"""A pytest plugin for `scripts/test --fast`: where a test would start rank processes, it is skipped.

No test has to be marked for it: both ways to ranks, an engine and a test cluster, end here. What a configuration is
refused for before any rank starts is still tested.
"""

from __future__ import annotations

from typing import NoReturn

import pytest

REASON = "starts rank processes"
IN_PROCESSES_OF_THEIR_OWN = {"test_killed_front_end_leaves_nothing"}  # where the plugin does not reach


def pytest_configure() -> None:
    from nonet.config.checkpoint import read_spec
    from nonet.config.resolve import resolve
    from nonet.config.schema import EngineConfig
    from nonet.engine.client import Client
    from nonet.testing.cluster import Cluster

    def engine(self: Client, config: EngineConfig) -> NoReturn:
        resolve(config, read_spec(config.model.model), num_gpus=0)
        pytest.skip(REASON)

    def cluster(*args: object, **kwargs: object) -> NoReturn:
        pytest.skip(REASON)

    Client.__init__ = engine  # type: ignore[method-assign]
    Cluster.__init__ = cluster  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in IN_PROCESSES_OF_THEIR_OWN:
            item.add_marker(pytest.mark.skip(reason=REASON))
