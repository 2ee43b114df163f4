"""Imports go down only. Reads every import of the package without running it, also those for types and in functions.

The house is the table FLOORS: the floors from the attic to the ground, and on each its units. A unit is a folder or a
file of the package; its files may import each other and whatever stands on lower floors, never a unit of their own
floor or above. No files import each other in a circle anywhere. Units in TORCH_FREE reach no file that imports torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "nonet"
ROOT = Path(__file__).parent.parent / PACKAGE

FLOORS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"server", "bench"},
    {"__init__"},  # the public names
    {"engine", "testing"},
    {"models"},
    {"moe"},
    {"layers"},  # above weights: a layer reads its own from a checkpoint
    {"weights", "transfer"},
    {"comm", "eplb", "schedule", "proxy", "launch"},
    {"config"},
    {"plugins", "openai"},
    {"types", "kernels"},
    {"errors", "compiled"},
]

TORCH_FREE = {"eplb", "schedule", "launch", "config", "plugins", "errors", "compiled", "types", "proxy", "openai"}


@cache
def files() -> dict[str, Path]:
    """Every module of the package by its dotted name; a folder's __init__ has the folder's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports(module: str) -> frozenset[str]:
    """What a module names in its imports: modules of the package, and the top-level names of others."""
    tree = ast.parse(files()[module].read_text(encoding="utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in _named(node, module))


def _named(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield _known(alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, module)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in files() else _known(base)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    if files()[module].name == "__init__.py":
        parts.append("__init__")
    return ".".join([*parts[: len(parts) - node.level], *(node.module or "").split(".")]).rstrip(".")


def _known(name: str) -> str:
    return name if name.split(".")[0] == PACKAGE else name.split(".")[0]


@cache
def edges() -> dict[str, frozenset[str]]:
    """The import graph inside the package, file by file."""
    return {
        module: frozenset(name for name in imports(module) if name.split(".")[0] == PACKAGE and name != module)
        for module in files()
    }


def height() -> dict[str, int]:
    return {unit: len(FLOORS) - i for i, floor in enumerate(FLOORS) for unit in floor}


def reached(module: str) -> set[str]:
    """All modules of the package that importing this one names, directly or not."""
    seen, todo = set(), [module]
    while todo:
        for name in edges().get(todo.pop(), ()):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def test_every_import_names_a_file():
    missing = [f"{module} -> {name}" for module, names in edges().items() for name in names if name not in files()]
    assert not missing


def test_every_unit_has_a_floor():
    assert {unit_of(module) for module in files()} <= set(height())
    assert len(height()) == sum(len(floor) for floor in FLOORS), "a unit stands on two floors"


def test_imports_go_down():
    up = [
        f"{module} (floor {height()[unit_of(module)]}) -> {name} (floor {height()[unit_of(name)]})"
        for module, names in edges().items()
        for name in names
        if unit_of(name) != unit_of(module) and height()[unit_of(name)] >= height()[unit_of(module)]
    ]
    assert not up


def test_no_files_import_each_other_in_a_circle():
    circles = sorted(module for module in files() if module in reached(module))
    assert not circles


def test_torch_free_units_reach_no_torch():
    heavy = {module for module in files() if "torch" in imports(module)}
    guilty = [
        f"{module} reaches torch through {sorted(({module} | reached(module)) & heavy)}"
        for module in files()
        if unit_of(module) in TORCH_FREE and ({module} | reached(module)) & heavy
    ]
    assert heavy, "the engine does import torch: the reading works"
    assert not guilty


def test_importing_them_loads_no_torch():
    """The same at run time, where the package's own __init__ and that of every parent folder run as well."""
    modules = [PACKAGE, *(module for module in files() if unit_of(module) in TORCH_FREE)]
    code = f"import sys\nfor m in {modules!r}:\n    __import__(m)\n    assert 'torch' not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reading_sees_every_form(tmp_path, monkeypatch):
    """A made-up package with an upward, a sideways, a lazy, a relative and a type-only import."""
    house = {
        "__init__.py": "from nonet.engine.core import run",
        "config/__init__.py": "",
        "config/load.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nonet.engine import core",
        "engine/__init__.py": "",
        "engine/core.py": "from . import loop\nfrom ..config import load",
        "engine/loop.py": "def late():\n    import torch.nn\n    from nonet.engine.core import run",
        "eplb/__init__.py": "import nonet.launch.local",
        "launch/__init__.py": "",
        "launch/local.py": "",
    }
    for name, text in house.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / PACKAGE)
    for cached in (files, imports, edges):
        cached.cache_clear()
    try:
        assert edges()["nonet.config.load"] == {"nonet.engine.core"}
        assert edges()["nonet.engine.core"] == {"nonet.engine.loop", "nonet.config.load"}
        assert edges()["nonet.eplb"] == {"nonet.launch.local"}
        assert "torch" in imports("nonet.engine.loop")
        assert "nonet.engine.core" in reached("nonet.engine.core")
        assert "nonet.config.load" in reached("nonet.config.load")
    finally:
        monkeypatch.undo()
        for cached in (files, imports, edges):
            cached.cache_clear()
