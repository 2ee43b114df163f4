"""The scripts' way to an environment, with a stand-in for Python that writes down what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STAND_IN = """#!/bin/sh
case "$*" in
    *version_info*) exit 0 ;;
    "-c import pip") exit "${NO_PIP:-0}" ;;
    "-m venv "*)
        for venv in "$@"; do :; done
        mkdir -p "$venv/bin" "$venv/lib/python3.11/site-packages" && cp "$0" "$venv/bin/python" ;;
esac
echo "$(basename "$(dirname "$0")")/$(basename "$0") $*" >>"$LOG"
case "$*" in *"$FAIL"*) exit 1 ;; esac
"""
COMMON = "--quiet --no-input --disable-pip-version-check --constraint {root}/requirements/pins.txt"


def call(command: list[str | Path], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


class Checkout:
    """A copy of the scripts and requirements, and a Python that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "a checkout", folder / "log"
        for name in (".ci", "scripts", "requirements"):
            shutil.copytree(ROOT / name, self.root / name)
        self.python = folder / "base" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """(exit code, standard error, what the stand-in was asked)."""
        self.log.write_text("")
        env = {"PATH": os.environ["PATH"], "LOG": str(self.log), "FAIL": "(none)", "PYTHON": str(self.python)}
        done = call([self.root / "scripts" / script, *arguments], env={**env, **variables})
        return done.returncode, done.stderr, self.log.read_text().replace(str(self.root), "{root}").splitlines()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def pinned(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_first_and_second_run(checkout):
    """venv, torch by itself, the rest, the program; then the program only."""
    torch = pinned("core.txt")[0]
    program = "bin/python -m nonet demo --ranks 2"
    code, _, log = checkout.run("demo", "--ranks", "2")
    assert code == 0
    assert log == [
        "base/python3 -m venv --clear {root}/.venv",
        f"bin/python -m pip install {torch} {COMMON}",
        f"bin/python -m pip install --requirement {{root}}/requirements/core.txt {COMMON}",
        program,
    ]
    packages = checkout.root / ".venv/lib/python3.11/site-packages"
    assert (packages / "nonet-checkout.pth").read_text() == f"{checkout.root}\n"
    assert checkout.run("demo", "--ranks", "2") == (0, "", [program])


def test_what_is_missing_is_added(checkout):
    checkout.run("demo")
    code, _, log = checkout.run("check")
    assert code == 0
    assert log == [
        f"bin/python -m pip install --requirement {{root}}/requirements/server.txt {COMMON}",
        f"bin/python -m pip install --requirement {{root}}/requirements/dev.txt {COMMON}",
        "bin/python -m ruff check .",
        "bin/python -m mypy",
    ]


def test_changed_requirements_are_installed_again(checkout):
    checkout.run("demo")
    with (checkout.root / "requirements" / "core.txt").open("a") as file:
        file.write("another==1.0\n")
    _, _, log = checkout.run("demo")
    assert [line.split(" -")[1] for line in log] == ["m pip install torch==2.13.0", "m pip install", "m nonet demo"]


def test_a_failed_installation_is_not_taken_for_a_good_one(checkout):
    code, _, log = checkout.run("demo", FAIL="core.txt")
    assert code != 0
    assert not any("nonet" in line.split("{root}")[0] for line in log)
    _, _, log = checkout.run("demo")
    assert len(log) == 3, "torch, the rest, the program"


def test_without_ensurepip_the_pip_of_the_base_installs(checkout):
    _, _, log = checkout.run("demo", FAIL="venv --clear {root}", NO_PIP="1")
    installs = [line for line in log if "pip" in line]
    assert len(installs) == 2
    assert all(line.startswith("base/python3 -m pip --python {root}/.venv/bin/python install ") for line in installs)


def test_a_moved_checkout_finds_itself(checkout):
    checkout.run("demo")
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    code, error, _ = checkout.run("demo")
    assert (code, error) == (0, "")
    assert (moved / ".venv/lib/python3.11/site-packages/nonet-checkout.pth").read_text() == f"{moved}\n"


def test_a_given_interpreter_is_used_as_it_is(checkout):
    _, _, log = checkout.run("demo", NONET_PYTHON=str(checkout.python))
    assert log == ["base/python3 -m nonet demo"]
    assert not (checkout.root / ".venv").exists()


def test_without_python_it_says_so(checkout, tmp_path):
    """A machine whose Pythons are all too old, or missing."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname", "cat", "cksum"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    code, error, log = checkout.run("demo", PATH=str(tools), PYTHON="python3")
    assert (code, log) == (1, [])
    assert error.startswith("nonet: no Python 3.11 or newer found; install one, or name it: PYTHON=")


@pytest.mark.parametrize("script", ["test", "test-gpu"])
def test_help(script):
    done = call([ROOT / "scripts" / script, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"./scripts/{script} " in done.stdout
    assert "set -eu" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "-m pytest -v -m not gpu and not gpus and not slow tests/test_scripts.py"),
        (["--full", "-x"], "-m pytest -v -m not gpu and not gpus -x tests/test_scripts.py"),
        (["--fast"], "-m pytest -v -p _fast -m not gpu and not gpus and not slow tests/test_scripts.py"),
        (["tests/test_scripts.py::test_help"],
         "-m pytest -v -m not gpu and not gpus and not slow tests/test_scripts.py::test_help"),
    ],
)  # fmt: skip
def test_what_pytest_is_asked(checkout, arguments, expected):
    (checkout.root / "tests").mkdir()
    shutil.copy(__file__, checkout.root / "tests")
    code, _, log = checkout.run("test", *arguments, NONET_PYTHON=str(checkout.python))
    assert code == 0
    checked = any("mypy" in line for line in log)
    assert checked == (not arguments or arguments[0] == "--full")
    assert log[-1] == f"base/python3 {expected}"


def test_every_requirement_is_pinned():
    files = ("core.txt", "server.txt", "dev.txt", "pins.txt")
    for name in files:
        assert [line for line in pinned(name) if line.count("==") != 1 or "*" in line] == []
    names = [line.partition("==")[0].lower() for name in files for line in pinned(name)]
    assert len(names) == len(set(names)), "a package is pinned twice"


def test_this_environment_has_the_pinned_versions():
    """Unless another interpreter was asked for, what runs here is what the files say."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment that the scripts make")
    from importlib.metadata import version

    wrong = [line for line in [*pinned("core.txt"), *pinned("server.txt"), *pinned("dev.txt")]
             if version(line.partition("==")[0]).partition("+")[0] != line.partition("==")[2]]  # fmt: skip
    assert wrong == []
