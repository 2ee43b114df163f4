"""A pytest plugin for `scripts/test --fast`: where a test would start rank processes, it is skipped.

No test has to be marked for it: both ways to ranks, an engine and a test cluster, are closed.
"""

from __future__ import annotations

from typing import NoReturn

import pytest


def _skip(*args: object, **kwargs: object) -> NoReturn:
    pytest.skip("starts rank processes")


def pytest_configure() -> None:
    from nonet.engine.client import Client
    from nonet.testing.cluster import Cluster

    Client.__init__ = _skip  # type: ignore[method-assign]
    Cluster.__init__ = _skip  # type: ignore[method-assign]
