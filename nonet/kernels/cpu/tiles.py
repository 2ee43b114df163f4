"""Matrix products by the processor's tiles (AMX): a weight as it lies in memory, times activations packed for it.

A weight's rows are the tiles on the left, 16 rows of 32 numbers, so nothing is repacked or kept twice; 16 rows of
activations are a panel, packed as the instruction wants them on the right. Products come out transposed and are turned
back as they are rounded. Used by the kernels beside, inside compiled code; knows no tensors.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.np.arrayobj import make_array

from nonet.kernels.cpu.dot import HAS_BF16_DOT
from nonet.kernels.cpu.llvm import (
    BFLOAT,
    BITS,
    BYTE,
    SINGLE,
    constant,
    declare,
    host_has,
    load,
    loop,
    pointer,
    prefetch,
    store,
    transposed,
)
from nonet.kernels.cpu.scalar import intrinsic

SIDE, DEPTH = 16, 32  # a tile: so many rows, each of so many bfloat16 numbers


def _allowed() -> bool:
    """Ask the system for the tiles' registers: a process must, once; its children have them too."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


HAS_TILES = HAS_BF16_DOT and host_has("amx-tile") and host_has("amx-bf16") and _allowed()


def _configuration_of(name: str) -> Any:
    """The instruction that loads, or stores, a tile configuration of 64 bytes."""

    @intrinsic
    def instruction(typing_context, config):
        def generate(context, builder, signature, arguments):
            data = make_array(signature.args[0])(context, builder, arguments[0]).data
            function = declare(builder, name, ir.VoidType(), [BYTE.as_pointer()])
            builder.call(function, [pointer(builder, data, constant(0))])
            return context.get_dummy_value()

        return types.void(config), generate

    return instruction


configure, remember = _configuration_of("llvm.x86.ldtilecfg"), _configuration_of("llvm.x86.sttilecfg")


@njit(inline="always")
def describe(config):
    """Fill a tile configuration, uint8 [64]: eight tiles of full size."""
    config[:] = 0
    config[0] = 1
    for tile in range(8):
        config[16 + 2 * tile] = 2 * DEPTH
        config[48 + tile] = SIDE


def _tile(builder: Any, name: str, tiles: list[int], *memory: Any) -> None:
    """A tile instruction: numbers of tiles, and for those of memory an address and a stride in bytes."""
    numbers = [ir.Constant(BYTE, tile) for tile in tiles]
    kinds = [*(number.type for number in numbers), *(operand.type for operand in memory)]
    builder.call(declare(builder, f"llvm.x86.{name}", ir.VoidType(), kinds), [*numbers, *memory])


def _panel_size(builder: Any, depth: Any) -> Any:
    return builder.mul(builder.lshr(depth, constant(1)), constant(SIDE))


def _multiply_of(panels: int) -> Any:
    """c[i, p, n, m] = w[row_i + n] . row m of panel number panel + p, for i in 0 and 1, and one or two panels.

    w is uint16 [N, D], x uint32 [panels, D / 2, 16], c float32 [2, 2, 16, 16]; D is a multiple of 32. `ahead` is how
    far behind those that are read the numbers of w lie that will be read next: they are asked for.
    """

    @intrinsic
    def fixed(typing_context, w, row_0, row_1, x, panel, ahead, c):
        def generate(context, builder, signature, arguments):
            w, x, c = (make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3, 6))
            depth = builder.extract_value(w.shape, 1)
            stride, size = builder.mul(depth, constant(2)), _panel_size(builder, depth)
            places = [builder.mul(row, depth) for row in arguments[1:3]]
            starts = [builder.mul(builder.add(arguments[4], constant(p)), size) for p in range(panels)]
            grid = [(i, p) for i in range(2) for p in range(panels)]  # tile 2 i + p: the sums; 4, 5: w; 6, 7: x

            def step(d: Any, _: list[Any]) -> list[Any]:
                for i, place in enumerate(places):
                    at = builder.add(place, d)
                    _tile(builder, "tileloadd64", [4 + i], pointer(builder, w.data, at), stride)
                    for r in range(SIDE):
                        line = builder.add(at, builder.mul(depth, constant(r)))
                        prefetch(builder, w.data, builder.add(line, arguments[5]))
                packed = builder.mul(d, constant(SIDE // 2))
                for p, start in enumerate(starts):
                    where = pointer(builder, x.data, builder.add(start, packed))
                    _tile(builder, "tileloadd64", [6 + p], where, constant(4 * SIDE))
                for i, p in grid:
                    _tile(builder, "tdpbf16ps", [2 * i + p, 4 + i, 6 + p])
                return []

            for i, p in grid:
                _tile(builder, "tilezero", [2 * i + p])
            loop(builder, depth, DEPTH, [], step)
            for i, p in grid:
                where = pointer(builder, c.data, constant((2 * i + p) * SIDE * SIDE))
                _tile(builder, "tilestored64", [2 * i + p], where, constant(4 * SIDE))
            return context.get_dummy_value()

        return types.void(w, types.intp, types.intp, x, types.intp, types.intp, c), generate

    return fixed


multiply_1, multiply_2 = _multiply_of(1), _multiply_of(2)


@intrinsic
def pack(typing_context, x, row, first, out, panel):
    """out[panel] = rows row[first : first + 16] of x, packed. x is uint16 [N, D], out uint32 [panels, D / 2, 16]."""

    def generate(context, builder, signature, arguments):
        x, row, out = (make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 3))
        depth = builder.extract_value(x.shape, 1)
        start = builder.mul(arguments[4], _panel_size(builder, depth))
        entries = [builder.gep(row.data, [builder.add(arguments[2], constant(m))]) for m in range(SIDE)]
        places = [builder.mul(builder.load(entry), depth) for entry in entries]
        pairs = ir.VectorType(BITS, SIDE)

        def step(d: Any, _: list[Any]) -> list[Any]:
            lines = [load(builder, x.data, builder.add(place, d), pairs) for place in places]
            to = builder.add(start, builder.mul(d, constant(SIDE // 2)))
            for k, line in enumerate(transposed(builder, lines)):
                store(builder, line, out.data, builder.add(to, constant(k * SIDE)))
            return []

        loop(builder, depth, DEPTH, [], step)
        return context.get_dummy_value()

    return types.void(x, row, types.intp, out, types.intp), generate


@intrinsic
def unpack(typing_context, c, i, p, out, first, column):
    """out[first + m, column + n] = c[i, p, n, m], rounded, for n and m in 0 .. 15. out is uint16 [M, D]."""

    def generate(context, builder, signature, arguments):
        c, out = (make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3))
        width = builder.extract_value(out.shape, 1)
        tile = builder.add(builder.mul(arguments[1], constant(2)), arguments[2])
        start = builder.mul(tile, constant(SIDE * SIDE))
        singles, rounded = ir.VectorType(SINGLE, SIDE), ir.VectorType(BFLOAT, SIDE)
        round_all = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", rounded, [singles])
        lines = [load(builder, c.data, builder.add(start, constant(n * SIDE)), singles) for n in range(SIDE)]
        for m, line in enumerate(transposed(builder, lines)):
            row = builder.mul(builder.add(arguments[4], constant(m)), width)
            store(builder, builder.call(round_all, [line]), out.data, builder.add(row, arguments[5]))
        return context.get_dummy_value()

    return types.void(c, types.intp, types.intp, out, types.intp, types.intp), generate
