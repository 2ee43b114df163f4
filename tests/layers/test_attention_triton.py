"""Attention layers with Triton kernels: their cases in the interpreter and on a GPU, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_triton import run_cases

CASES = Path(__file__).parent / "triton_cases.py"


def test_in_the_interpreter():
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases(CASES, interpreted=False)
