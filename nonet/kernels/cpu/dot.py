"""Products of a weight with a few rows of activations, reading the weight once.

In bfloat16 by the processor's own instruction where it has one (AVX512-BF16: two products added to each float32 sum a
lane), else, and in float32, by loops that the compiler vectorises. Used by the kernels beside; knows no tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload
from numba.np.arrayobj import make_array

from nonet.kernels.cpu.llvm import BFLOAT, SINGLE, constant, declare, host_has, load, loop, prefetch
from nonet.kernels.cpu.scalar import f32, intrinsic

HAS_BF16_DOT = host_has("avx512bf16")
MOST_ROWS = 4  # of one call: with more the products, no longer the weights, would take the time
_LANES = 32
# Weights come from memory, and the hardware's own prefetching stops at every page: asking for each line this far ahead,
# and reading from two places at once, takes half the time (measured on a Xeon with AMX).
_AHEAD_BYTES = 4096


def products(w: Any, x: Any, count: Any, out: Any) -> None:
    """out[r, n] = the product of w[n] and x[r] in float32: w [N, D], the first `count` (1 to 4) rows of x [4, D].

    All of the 4 rows of out [4, N] must exist: those past count may be written.
    """
    raise NotImplementedError("only inside compiled code")


@overload(products)
def _products(w, x, count, out):
    if not (isinstance(w.dtype, types.Integer) and HAS_BF16_DOT):
        return _plain

    def fast(w, x, count, out):
        N, D = w.shape
        whole = D // _LANES * _LANES
        if whole == 0 or N == 0:
            out[:count] = 0
        elif count == 1:
            _products1(w, x, out, whole)
        elif count == 2:
            _products2(w, x, out, whole)
        elif count == 3:
            _products3(w, x, out, whole)
        else:
            _products4(w, x, out, whole)
        if whole < D:
            for r in range(count):
                for n in range(N):
                    for d in range(whole, D):
                        out[r, n] += f32(w[n, d]) * f32(x[r, d])

    return fast


def _plain(w, x, count, out):
    for r in range(count):
        for n in range(len(w)):
            total = np.float32(0)
            for d in range(w.shape[1]):
                total += f32(w[n, d]) * f32(x[r, d])
            out[r, n] = total


def _products_of(rows: int) -> Any:
    """Both loops for a fixed number of rows: out[r, n] = w[n, :whole] . x[r, :whole]; neither N nor whole is 0.

    Rows n and n + N // 2 of w go together; with an odd N the middle one is computed twice.
    """

    @intrinsic
    def fixed(typing_context, w, x, out, whole):
        def generate(context, builder, signature, arguments):
            w, x, out = (make_array(signature.args[i])(context, builder, arguments[i]) for i in range(3))
            sums, lanes = ir.VectorType(SINGLE, _LANES // 2), ir.VectorType(BFLOAT, _LANES)
            multiply_add = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", sums, [sums, lanes, lanes])
            add_up = declare(builder, "llvm.vector.reduce.fadd.v16f32", SINGLE, [SINGLE, sums])
            zero = ir.Constant(SINGLE, 0.0)
            height, depth = (builder.extract_value(w.shape, axis) for axis in range(2))
            width, columns = builder.extract_value(x.shape, 1), builder.extract_value(out.shape, 1)
            apart = builder.lshr(height, constant(1))

            def two_rows(n: Any, _: list[Any]) -> list[Any]:
                places = [builder.mul(row, depth) for row in (n, builder.add(n, apart))]

                def next_lanes(d: Any, totals: list[Any]) -> list[Any]:
                    weights = []
                    for place in places:
                        at = builder.add(place, d)
                        weights.append(load(builder, w.data, at, lanes))
                        prefetch(builder, w.data, builder.add(at, constant(_AHEAD_BYTES // 2)))
                    starts = [builder.mul(constant(r), width) for r in range(rows)]
                    x_rows = [load(builder, x.data, builder.add(start, d), lanes) for start in starts]
                    pairs = [(weight, row) for weight in weights for row in x_rows]
                    return [builder.call(multiply_add, [t, *pair]) for t, pair in zip(totals, pairs, strict=True)]

                zeros = ir.Constant(sums, [zero] * (_LANES // 2))
                totals = loop(builder, arguments[3], _LANES, [zeros] * (2 * rows), next_lanes)
                for i, total in enumerate(totals):
                    result = builder.call(add_up, [zero, total], fastmath=("reassoc",))
                    line = builder.mul(constant(i % rows), columns)
                    row = builder.add(n, apart) if i >= rows else n
                    builder.store(result, builder.gep(out.data, [builder.add(line, row)]))
                return []

            loop(builder, builder.sub(height, apart), 1, [], two_rows)
            return context.get_dummy_value()

        return types.void(w, x, out, types.intp), generate

    return fixed


_products1, _products2, _products3, _products4 = (_products_of(rows) for rows in (1, 2, 3, 4))
