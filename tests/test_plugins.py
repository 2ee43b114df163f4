"""Implementations found by file name: listed without importing, loaded when asked for, refused with a reason."""

from __future__ import annotations

import sys

import pytest

from nonet import plugins
from nonet.errors import ConfigError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `shapes_<n>` on the path, and its folder."""
    name = f"shapes_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "circle.py").write_text("SIDES = 0\n")
    (folder / "square.py").write_text("SIDES = 4\n\n\ndef unavailable():\n    return None\n")
    (folder / "_hidden.py").write_text("raise AssertionError('imported')\n")
    (folder / "explosive.py").write_text("raise AssertionError('imported')\n")
    (folder / "needs_more.py").write_text("import a_library_that_is_not_there\n")
    (folder / "elsewhere.py").write_text("def unavailable():\n    return 'needs eight hands'\n")
    (folder / "notes.txt").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def test_files_are_listed_sorted_and_not_imported(package):
    assert plugins.names(package) == ("circle", "elsewhere", "explosive", "needs_more", "square")
    assert f"{package}.circle" not in sys.modules


def test_a_new_file_is_a_new_implementation(package, tmp_path):
    (tmp_path / package / "triangle.py").write_text("SIDES = 3\n")
    assert "triangle" in plugins.names(package)
    assert plugins.load(package, "triangle", "shape").SIDES == 3


def test_loading_by_name(package):
    assert plugins.load(package, "circle", "shape").SIDES == 0
    assert plugins.load(package, "square", "shape").SIDES == 4


def test_code_of_others_is_loaded_by_its_dotted_name(package):
    assert plugins.load("nonet.moe.all2all", f"{package}.square", "all2all_backend").SIDES == 4


@pytest.mark.parametrize("name", ["circel", "_hidden", "__init__", ""])
def test_an_unknown_name_is_refused_with_the_field(package, name):
    with pytest.raises(ConfigError) as caught:
        plugins.load(package, name, "shape")
    assert (caught.value.field, caught.value.value) == ("shape", name)
    assert "circle" in caught.value.remedy


def test_checking_a_name_imports_nothing(package):
    plugins.check(package, "explosive", "shape")
    with pytest.raises(ConfigError, match=r"^shape = 'circel': did you mean 'circle'\?$"):
        plugins.check(package, "circel", "shape")


def test_a_missing_library_hurts_only_who_asks(package):
    with pytest.raises(ConfigError, match=r"^shape = 'needs_more': cannot be imported: .*a_library_that_is_not_there"):
        plugins.load(package, "needs_more", "shape")
    with pytest.raises(ConfigError, match=r"cannot be imported: "):
        plugins.load(package, f"{package}.nowhere", "shape")


def test_what_cannot_run_here_gives_its_reason(package):
    with pytest.raises(ConfigError, match="^shape = 'elsewhere': not available here: needs eight hands$"):
        plugins.load(package, "elsewhere", "shape")


def test_what_nonet_ships():
    assert {"local", "naive", "allgather_reducescatter", "all2allv", "shm", "tensor"} <= set(
        plugins.names("nonet.moe.all2all")
    )
    assert {"reference", "grouped"} <= set(plugins.names("nonet.moe.experts"))
    assert {"base", "qwen3_moe"} <= set(plugins.names("nonet.models"))
