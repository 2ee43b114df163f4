"""The public names: sorted, complete, and there."""

from __future__ import annotations

import types

import nonet


def test_all_is_sorted_and_unique():
    in_order = sorted(set(nonet.__all__), key=lambda name: (not name.isupper(), name))  # as ruff sorts: LLM first
    assert nonet.__all__ == in_order


def test_every_name_is_there():
    assert [name for name in nonet.__all__ if not hasattr(nonet, name)] == []


def test_nothing_public_is_left_out():
    """Whatever `import nonet` shows without an underscore is a submodule or stands in __all__."""
    public = {
        name
        for name, value in vars(nonet).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(nonet.__all__)


def test_errors_share_one_base():
    errors = [getattr(nonet, name) for name in nonet.__all__ if name.endswith(("Error", "Timeout"))]
    assert len(errors) >= 8
    assert all(issubclass(error, nonet.NonetError) for error in errors)
