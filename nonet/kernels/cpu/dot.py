"""Dot products of one weight row with a few rows of activations, reading the weight once.

In bfloat16 by the processor's own instruction where it has one (AVX512-BF16: two products added to each float32 sum a
lane), else, and in float32, by loops that the compiler vectorises. Used by the kernels beside; knows no tensors.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import overload
from numba.np.arrayobj import make_array

from nonet.kernels.cpu.scalar import f32, intrinsic

# Numba's own settings may ask for code that runs on other processors too.
_any_processor: bool = bool(config.CPU_NAME)  # type: ignore[attr-defined]
HAS_BF16_DOT = not _any_processor and bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))
MOST_ROWS = 4  # of one call: with more the products, no longer the weights, would take the time
_LANES = 32
# Weights come from memory, and the hardware's own prefetching stops at every page: asking for each line this far ahead
# reads them 1.4 to 2 times faster (measured on a Xeon with AMX).
_AHEAD_BYTES = 4096


def dots(w: Any, x: Any, count: Any, out: Any, n: Any) -> None:
    """out[r, n] = the product of w [D] and x[r] [D] in float32, for the first `count` (1 to 4) rows of x [4, D].

    All of out's first 4 rows must exist: those past count may be written.
    """
    raise NotImplementedError("only inside compiled code")


@overload(dots)
def _dots(w, x, count, out, n):
    if not (isinstance(w.dtype, types.Integer) and HAS_BF16_DOT):
        return _plain

    def fast(w, x, count, out, n):
        whole = len(w) // _LANES * _LANES
        if whole == 0:
            out[:count, n] = 0
        elif count == 1:
            _dot1(w, x, out, n, whole)
        elif count == 2:
            _dot2(w, x, out, n, whole)
        elif count == 3:
            _dot3(w, x, out, n, whole)
        else:
            _dot4(w, x, out, n, whole)
        for r in range(count):
            for d in range(whole, len(w)):
                out[r, n] += f32(w[d]) * f32(x[r, d])

    return fast


def _plain(w, x, count, out, n):
    for r in range(count):
        total = np.float32(0)
        for d in range(len(w)):
            total += f32(w[d]) * f32(x[r, d])
        out[r, n] = total


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite has no name for."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()


def _dot_of(rows: int) -> Any:
    """The loop over the lanes for a fixed number of rows: out[r, n] = w[:whole] . x[r, :whole]; whole is not 0."""

    @intrinsic
    def dot(typing_context, w, x, out, n, whole):
        def generate(context, builder, signature, arguments):
            w, x, out = (make_array(signature.args[i])(context, builder, arguments[i]) for i in range(3))
            index, single = ir.IntType(64), ir.FloatType()
            sums, lanes = ir.VectorType(single, _LANES // 2), ir.VectorType(_BFloat(), _LANES)
            multiply_add = _declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", sums, [sums, lanes, lanes])
            add_up = _declare(builder, "llvm.vector.reduce.fadd.v16f32", single, [single, sums])

            def load(data: Any, at: Any) -> Any:
                value = builder.load(builder.bitcast(builder.gep(data, [at]), lanes.as_pointer()))
                value.align = 2
                return value

            width, columns = builder.extract_value(x.shape, 1), builder.extract_value(out.shape, 1)
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            d, totals = builder.phi(index), [builder.phi(sums) for _ in range(rows)]
            d.add_incoming(ir.Constant(index, 0), before)
            weight = load(w.data, d)
            ahead = builder.gep(w.data, [builder.add(d, ir.Constant(index, _AHEAD_BYTES // 2))])
            _prefetch(builder, ahead)
            for r, total in enumerate(totals):
                total.add_incoming(ir.Constant(sums, [ir.Constant(single, 0.0)] * (_LANES // 2)), before)
                row = load(x.data, builder.add(builder.mul(ir.Constant(index, r), width), d))
                total.add_incoming(builder.call(multiply_add, [total, weight, row]), loop)
            following = builder.add(d, ir.Constant(index, _LANES))
            d.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, arguments[4]), loop, after)
            builder.position_at_end(after)
            for r, total in enumerate(totals):
                result = builder.call(add_up, [ir.Constant(single, 0.0), total.incomings[1][0]], fastmath=("reassoc",))
                place = builder.add(builder.mul(ir.Constant(index, r), columns), arguments[3])
                builder.store(result, builder.gep(out.data, [place]))
            return context.get_dummy_value()

        return types.void(w, x, out, types.intp, types.intp), generate

    return dot


def _prefetch(builder: Any, pointer: Any) -> None:
    """For reading, into all caches; an address outside of all memory does no harm."""
    flag, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    prefetch = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, flag, flag, flag])
    builder.call(prefetch, [builder.bitcast(pointer, byte), *(ir.Constant(flag, value) for value in (0, 3, 1))])


def _declare(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


_dot1, _dot2, _dot3, _dot4 = (_dot_of(rows) for rows in (1, 2, 3, 4))
