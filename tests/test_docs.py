"""The documents are true: commands and Python examples run, links lead somewhere, files that are named exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

# Commands that are not run here, by their first words, and who runs them.
ELSEWHERE = {
    "./scripts/demo": "tests/test_demo.py, by the same command inside",
    "./scripts/test": "this is it",
    "pip install .": "builds a wheel in an environment of its own; needs a package index",
    "python benchmarks/": "measurements, run by hand on a quiet machine",
    "python tools/": "training, on a GPU",
    "./benchmarks/": "measurements, run by hand on a quiet machine",
}
RANKS = re.compile(r"\bLLM\(|^nonet (generate|demo|bench (throughput|latency))")  # starts processes


def blocks(language: str) -> list[tuple[str, str]]:
    """(document:line, text) of every fenced block in a language."""
    found = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append((f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 2}", match[1]))
    return found


def commands() -> list[tuple[str, str]]:
    """(document:line, command) of every line of a sh block; a backslash continues a line."""
    return [
        (where, line.strip())
        for where, text in blocks("sh")
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def elsewhere(command: str) -> bool:
    """Whether the command is one of those, with or without arguments; a folder stands for all in it."""
    return any(command.startswith(start) if start.endswith("/") else f"{command} ".startswith(f"{start} ")
               for start in ELSEWHERE)  # fmt: skip


def runs(arguments: list[str], cwd: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def fast(request) -> bool:
    """Whether rank processes are not wanted: `scripts/test --fast`."""
    return request.config.pluginmanager.has_plugin("_fast")


def test_there_are_commands_and_examples():
    assert len(commands()) >= 5
    assert len(blocks("python")) >= 2
    assert {path.name for path in DOCS} >= {
        "README.md", "tour.md", "glossary.md", "all2all.md", "serving.md", "configuration.md", "bench.md",
    }  # fmt: skip


@pytest.mark.parametrize(("where", "command"), commands())
def test_commands(where, command, tmp_path, fast):
    """A `nonet` command is run in an empty folder; any other has to be covered elsewhere."""
    if not command.startswith("nonet "):
        assert elsewhere(command), f"{where}: neither run here nor listed as covered elsewhere"
        program = command.split()[0]
        assert not program.startswith("./") or os.access(ROOT / program, os.X_OK), f"{where}: cannot be run"
        return
    if fast and RANKS.search(command):
        pytest.skip("starts rank processes")
    assert runs([sys.executable, "-m", *shlex.split(command)], tmp_path)


@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_python_examples(where, text, tmp_path, fast):
    if fast and RANKS.search(text):
        pytest.skip("starts rank processes")
    assert runs([sys.executable, "-c", text], tmp_path)


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path):
    targets = [link.partition("#")[0] for link in links(path) if "://" not in link]
    missing = [target for target in targets if target and not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    """Names in backquotes that begin with a folder of the repository."""
    folders = "nonet|tests|docs|scripts|tools|benchmarks|requirements"
    names = re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text(encoding="utf-8"))
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_the_tour_names_files_with_their_paths():
    """A link's text is the path below the package, so that it can be searched for."""
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    pairs = re.findall(r"^\| \[([^\]]+)\]\(\.\./(nonet/)?([^)]+)\)", tour, re.MULTILINE)
    assert len(pairs) > 40
    assert [text for text, _, target in pairs if text != target] == []


def test_settings_and_variables_that_are_named_exist():
    """Words such as `max_num_tokens` are settings, environment variables (pip's aside), or names in the code."""
    from nonet.config.env import VARIABLES
    from nonet.config.load import leaves

    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nonet").rglob("*.py"))
    for name in ("README.md", "docs/all2all.md", "docs/configuration.md", "docs/glossary.md"):
        words = set(re.findall(r"`([a-zA-Z]+(?:_[a-zA-Z0-9]+)+)`", (ROOT / name).read_text(encoding="utf-8")))
        unknown = {word for word in words if word not in leaves() and word not in VARIABLES and word[:4] != "PIP_"}
        assert not {word for word in unknown if not re.search(rf"\b{word}\b", code)}, name
