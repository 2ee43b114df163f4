"""Decode attention over a paged cache of latents: one row a token, key of all heads, its first numbers also the value.

Specified by `layers.mla.LatentAttention.absorbed`, which puts queries into the rows' terms before and takes the result
out of them after. The kernels are those of `decode`, with one KV head, on all GPUs and in the interpreter; on Hopper,
more than 16 heads over rows as DeepSeek's are `latent_hopper`'s, which needs the chip and is tested on it.
Legend: B sequences, H heads, c width of the latent, W of a row, N blocks of the longest context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nonet.kernels.triton.decode import LOG2_E, Tile, cores, join, run, scratch, slots


def decode(
    q_BHW: Tensor,
    cache_row: Tensor,
    block_BN: Tensor,
    length_B: Tensor,
    block_size: int,
    width: int,
    scale: float,
    tile: Tile | None = None,
) -> Tensor:
    """[B, H, c]: each sequence's one token attends to its context, the first length_B places of its blocks.

    cache_row: [places, 1, W] in q's dtype; block_BN, length_B: int64; width: c; a sequence of length 0 gets zeros.
    """
    B, H, W = q_BHW.shape
    out_BHc = torch.empty((B, H, width), dtype=q_BHW.dtype, device=q_BHW.device)
    if tile is None and H > 16 and fits_hopper(q_BHW, cache_row, width, block_size):
        _hopper(q_BHW, cache_row, block_BN, length_B, block_size, out_BHc, scale)
    else:
        tile = tile or choose(H, q_BHW.element_size())
        sight = None, None, None, scale
        run(q_BHW, cache_row, None, block_BN, length_B, block_size, out_BHc, width, W - width, *sight, tile)
    return out_BHc


def choose(heads: int, bytes_a_number: int) -> Tile:
    """Fastest on an H100, up to 16 heads; beyond, what shared memory of all GPUs since then can hold."""
    if bytes_a_number > 2:
        return Tile(16, 16, 4, 2, 1)
    return Tile(32, 16, 4, 3, 2) if heads <= 16 else Tile(32, 64, 8, 2, 1)


def fits_hopper(q_BHW: Tensor, cache_row: Tensor, width: int, block_size: int) -> bool:
    """Whether `latent_hopper` is made for these rows, where they lie, and this GPU."""
    wanted = q_BHW.element_size() == 2 and (width, q_BHW.shape[2]) == (512, 576) and block_size % 16 == 0
    wanted = wanted and cache_row.is_contiguous() and q_BHW.data_ptr() % 16 == cache_row.data_ptr() % 16 == 0
    return wanted and q_BHW.is_cuda and torch.cuda.get_device_capability(q_BHW.device)[0] == 9


def _hopper(
    q_BHW: Tensor, cache_row: Tensor, block_BN: Tensor, length_B: Tensor, block_size: int, out_BHc: Tensor, scale: float
) -> None:
    from nonet.kernels.triton import latent_hopper as kernel

    (B, H, W), c = q_BHW.shape, out_BHc.shape[2]
    if not B:
        return
    packs = -(-H // kernel.HEADS)
    programs = max(1, cores(q_BHW.device) // packs)
    left = scratch(programs, packs * kernel.HEADS, c, q_BHW.device)
    queries = _boxes(q_BHW.contiguous().view(B * H, W), kernel.HEADS)
    rows = _boxes(cache_row.view(-1, W), math.gcd(block_size, kernel.HEADS))
    kernel.spans[(programs * packs,)](
        *queries, *rows, block_BN, length_B, out_BHc, *left, B, block_BN.stride(0), H, *out_BHc.stride()[:2],
        scale * LOG2_E.value, programs, G=H, SIZE=block_size, SLOTS=slots(B), PACKS=packs, num_warps=kernel.WARPS,
    )  # fmt: skip
    join(out_BHc, *left, 1)


def _boxes(x: Tensor, rows: int) -> Iterator[object]:
    """[n, W] as the copy engine fetches it: so many rows of half of a value, and of what is not value."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from nonet.kernels.triton import latent_hopper as kernel

    for columns in (kernel.HALF, x.shape[1] - 2 * kernel.HALF):
        yield TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], kernel.SHARED.value)
