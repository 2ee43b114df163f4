"""Numbers to e4m3 with a factor for each block, and back: by the formula, for sizes that no block divides."""

from __future__ import annotations

import pytest
import torch

from nonet.kernels.fp8 import FP8, LARGEST, blocks_of, dequantize, dequantize_reference, quantize

SHAPES = [(128, 128), (256, 384), (130, 257), (1, 1), (7, 300), (127, 129)]


def drawn(N: int, K: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand((N, 1), generator=generator) * 10 - 5  # rows of very different size
    return torch.randn((N, K), generator=generator) * spread.exp()


def by_hand(weight: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Number by number."""
    n = torch.arange(weight.shape[0])[:, None] // block
    k = torch.arange(weight.shape[1])[None] // block
    return weight.float() * scale[n, k]


@pytest.mark.parametrize("block", [128, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape, block):
    weight = drawn(*shape)
    numbers, scale = quantize(weight, block)
    assert numbers.dtype == FP8
    assert numbers.shape == shape
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-shape[0] // block), -(-shape[1] // block))
    back = dequantize(numbers, scale, block, torch.float32)
    assert torch.equal(back, by_hand(numbers, scale, block))
    # three bits of mantissa: half a step is 1/16 of a number, or of the least normal one, 2^-6
    most = by_hand(torch.ones(shape), scale, block) * 2**-6
    assert ((back - weight).abs() <= torch.maximum(weight.abs(), most) / 16 * 1.0001).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_number_of_each_block_is_kept(shape):
    weight = drawn(*shape)
    numbers, scale = quantize(weight, 128)
    for n in range(scale.shape[0]):
        for k in range(scale.shape[1]):
            own = slice(n * 128, (n + 1) * 128), slice(k * 128, (k + 1) * 128)
            assert numbers[own].float().abs().max() == LARGEST
            torch.testing.assert_close(scale[n, k] * LARGEST, weight[own].abs().max())


def test_zeros_stay_zeros():
    numbers, scale = quantize(torch.zeros(3, 200), 128)
    assert (scale > 0).all()
    assert torch.equal(dequantize(numbers, scale, 128, torch.float32), torch.zeros(3, 200))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.ones(4, 300)
    weight[3, 299] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(0, 130), (0, 1), (5, 40), (16, 32), (31, 129), (48, 130)])
@pytest.mark.parametrize("columns", [(0, 70), (3, 15), (16, 70), (63, 66)])
def test_a_part_is_that_part_of_the_whole(rows, columns, dtype):
    weight, block = drawn(130, 70), 16
    numbers, scale = quantize(weight, block)
    whole = dequantize(numbers, scale, block, dtype)
    n, k = blocks_of(rows, block), blocks_of(columns, block)
    part = dequantize(
        numbers[slice(*rows), slice(*columns)],
        scale[slice(*n), slice(*k)],
        block,
        dtype,
        first=(rows[0] % block, columns[0] % block),
    )
    assert part.dtype == dtype
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_more_precise_than_one_factor_for_all():
    """What blocks are for: a large number costs its own block only."""
    weight = torch.randn((256, 256), generator=torch.Generator().manual_seed(3)) * 1e-3
    weight[0, 0] = 100

    def error(block: int) -> float:
        return float((dequantize(*quantize(weight, block), block, torch.float32) - weight)[128:].norm())

    assert error(128) < 0.5 * error(256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_knows_all_numbers(dtype):
    """Bit for bit as PyTorch: zeros of both signs, NaN, and numbers below the normal ones among them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(4, 64).view(FP8)
    scale = torch.tensor([[0.37, 1e-3, 250.0, 1e-6]])
    want = dequantize_reference(numbers, scale, 16, (3, 0), torch.empty(4, 64, dtype=dtype))
    got = dequantize(numbers, scale, 16, dtype, first=(3, 0))
    assert int(got.isnan().sum()) == 2
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(torch.where(got.isnan(), 7, got).view(bits), torch.where(want.isnan(), 7, want).view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [(0, 0), (5, 0), (0, 15), (9, 3)])
@pytest.mark.parametrize("shape", [(40, 50), (1, 1), (3, 200), (0, 5), (5, 0)])
def test_the_compiled_kernel_is_the_specification(shape, first, dtype):
    n, k = (-(-(size + skip) // 16) for size, skip in zip(shape, first, strict=True))
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand((n + 1, k), generator=generator)  # a row of factors too many, as of a part of a weight
    numbers = (torch.randn(shape, generator=generator) * 100).to(FP8)
    want = dequantize_reference(numbers, scale, 16, first, torch.empty(shape, dtype=dtype))
    assert torch.equal(dequantize(numbers, scale, 16, dtype, first=first), want)
