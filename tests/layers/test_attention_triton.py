"""Attention layers with Triton kernels: their cases in the interpreter and on a GPU, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CASES = Path(__file__).parent / "triton_cases.py"


def run_cases(**env: str) -> str:
    quiet = ["-W", "ignore::DeprecationWarning"]  # of NumPy, by the interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *quiet, str(CASES)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_in_the_interpreter():
    assert "[100%]" in run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu():
    said = run_cases(TRITON_INTERPRET="0")
    assert "[100%]" in said
    assert "SKIPPED" not in said
