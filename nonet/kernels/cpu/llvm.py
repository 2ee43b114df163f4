"""What the kernels need of LLVM beyond Numba's language: vector loads, prefetches, loops, instructions by name.

Used by the files here that write instructions themselves (`dot`, `tiles`), inside Numba's intrinsics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config

BYTE, INDEX, SINGLE, BITS = ir.IntType(8), ir.IntType(64), ir.FloatType(), ir.IntType(32)

# Numba's own settings may ask for code that runs on other processors too.
_features = {} if bool(config.CPU_NAME) else llvmlite.binding.get_host_cpu_features()  # type: ignore[attr-defined]


def host_has(feature: str) -> bool:
    """Whether this processor has an extension, by LLVM's name for it, and compiled code may use it."""
    return bool(_features.get(feature))


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT = _BFloat()


def constant(value: int) -> Any:
    return ir.Constant(INDEX, value)


def declare(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """The instruction (or function of LLVM's) of this name."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def pointer(builder: Any, data: Any, at: Any) -> Any:
    """To bytes: the address of element `at`."""
    return builder.bitcast(builder.gep(data, [at]), BYTE.as_pointer())


def load(builder: Any, data: Any, at: Any, kind: Any) -> Any:
    """A vector that begins at element `at`."""
    value = builder.load(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()))
    value.align = 2
    return value


def store(builder: Any, value: Any, data: Any, at: Any) -> None:
    """A vector to where element `at` begins."""
    stored = builder.store(value, builder.bitcast(builder.gep(data, [at]), value.type.as_pointer()))
    stored.align = 2


def prefetch(builder: Any, data: Any, at: Any) -> None:
    """For reading, into all caches; an address outside of all memory does no harm."""
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [BYTE.as_pointer(), BITS, BITS, BITS])
    builder.call(function, [pointer(builder, data, at), *(ir.Constant(BITS, value) for value in (0, 3, 1))])


def loop(
    builder: Any, end: Any, step: int, start: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """At least one round of `body(i, values) -> values` for i = 0, step, ... < end; the values of the last."""
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    i, values = builder.phi(INDEX), [builder.phi(value.type) for value in start]
    results = body(i, values)
    following = builder.add(i, constant(step))
    for phi, first, result in zip([i, *values], [constant(0), *start], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, end), inside, after)
    builder.position_at_end(after)
    return results


def transposed(builder: Any, lines: Sequence[Any]) -> list[Any]:
    """The columns of a square of as many vectors as each has elements (a power of two)."""
    side = len(lines)
    halves = [
        ir.Constant(ir.VectorType(BITS, side), [k // 2 + k % 2 * side + upper * side // 2 for k in range(side)])
        for upper in range(2)
    ]
    lines = list(lines)
    for _ in range(side.bit_length() - 1):  # each round interleaves the halves of the square
        lines = [builder.shuffle_vector(lines[i // 2], lines[(i + side) // 2], halves[i % 2]) for i in range(side)]
    return lines
