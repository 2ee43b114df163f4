"""For tests of Triton kernels: their cases in a process of its own, and compiled for GPUs that need not be here.

The interpreter is chosen by an environment variable that is read when kernels are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
MOST_SHARED = 232448  # bytes of shared memory that a program may have on sm_90 and sm_100


def run_cases(cases: Path, *, interpreted: bool) -> None:
    """All tests of a file: in the interpreter, or compiled, where none may be skipped."""
    quiet = ["-W", "ignore::DeprecationWarning"]  # of NumPy, by the interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *quiet, str(cases)]
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[100%]" in done.stdout
    assert interpreted or "SKIPPED" not in done.stdout


def compile_for(
    architecture: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    aligned: Iterable[str] = (),
    **options: object,
) -> str:
    """Its PTX. types: of arguments, those that no one names being constants; aligned: arguments that 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "constexpr") for name in names}
    even = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        source(kernel, signature=signature, constexprs=constants, attrs=even),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= MOST_SHARED
    return str(compiled.asm["ptx"])
