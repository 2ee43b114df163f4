"""Decode attention in Triton against its plain forms: on a GPU, or on CPU tensors in Triton's interpreter.

Run by test_decode.py in a process of its own, since the interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nonet.kernels.triton import INTERPRETED, decode, latent_decode
from nonet.kernels.triton.decode import Tile
from nonet.layers import attention
from nonet.layers.attention import Sight

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the largest value
ROWS = Tile(16, 16, 4, 2, 1)
TALL = Tile(32, 64, 4, 2, 1)


def paged(lengths: list[int], block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block_BN, length_B, which places of the cache are nobody's): blocks in no order; past its end a row repeats its
    first."""
    generator = torch.Generator().manual_seed(2)
    blocks = [-(-length // block_size) for length in lengths]
    order = iter((torch.randperm(sum(blocks) + 2, generator=generator)).tolist())
    table = [[next(order) for _ in range(count)] for count in blocks]
    longest = max(1, *blocks) + 1
    unused = torch.ones((sum(blocks) + 2, block_size), dtype=torch.bool)
    for row, length in zip(table, lengths, strict=True):
        for position in range(length):
            unused[row[position // block_size], position % block_size] = False
        row.extend([row[0] if row else 0] * (longest - len(row)))
    return torch.tensor(table, device=DEVICE), torch.tensor(lengths, device=DEVICE), unused.view(-1).to(DEVICE)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def near(got: torch.Tensor, want: torch.Tensor, length_B: torch.Tensor) -> None:
    want = torch.where((length_B > 0)[:, None, None], want, 0)  # the plain form has no rule for an empty context
    assert got.shape == want.shape
    assert float((got.float() - want).abs().max()) <= TOLERANCE[got.dtype] * float(want.abs().max())


def grouped(
    lengths: list[int],
    shape: tuple[int, int, int] = (4, 2, 32),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sight: Sight = attention.PLAIN,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """Kernel against the plain form. Queries are a part of wider rows; NaN stands where no context is."""
    (H, h, d), B = shape, len(lengths)
    block_BN, length_B, unused = paged(lengths, block_size)
    q_BHd = draw(B, H + 3, d, dtype=dtype)[:, :H]
    keys, values = draw(2, len(unused), h, d, dtype=dtype).unbind()
    keys[unused] = values[unused] = torch.nan
    out = torch.full((B, H, d), torch.nan, dtype=dtype, device=DEVICE)
    where, seen = (block_BN, length_B, block_size), (sight.window, sight.chunk, sight.sink_H, sight.scale)
    if programs is None:
        decode.decode(q_BHd, (keys, values), *where, out, *seen, tile)
    else:
        decode.run(q_BHd, keys, values, *where, out, d, 0, *seen, tile or ROWS, programs)
    cache = keys.float(), values.float()
    near(out, attention.decode(q_BHd.float(), cache, block_BN, length_B.clamp(min=1), block_size, sight), length_B)


def sinks(H: int) -> torch.Tensor:
    return draw(H, dtype=torch.float32) * 3


SIGHTS = {
    "all": Sight(),
    "scale": Sight(scale=0.3),
    "window": Sight(window=9),
    "wide window": Sight(window=33),
    "chunk": Sight(chunk=32),
    "both": Sight(window=20, chunk=64),
}


@pytest.mark.parametrize("tile", [ROWS, TALL])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
def test_sights(sight, with_sinks, tile):
    sight = replace(sight, sink_H=sinks(4)) if with_sinks else sight
    grouped([70, 0, 1, 64, 33], sight=sight, tile=tile)


@pytest.mark.parametrize("tile", [ROWS, TALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types(dtype, tile):
    grouped([40, 3, 17], dtype=dtype, sight=Sight(sink_H=sinks(4)), tile=tile)


@pytest.mark.parametrize("block_size", [1, 4, 5, 64])
@pytest.mark.parametrize("shape", [(2, 2, 16), (6, 2, 24), (5, 1, 48), (20, 1, 8)])
def test_shapes(shape, block_size):
    grouped([37, 1, 66], shape, block_size)


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 40])
def test_wherever_contexts_are_cut(programs):
    """Cuts within one, at its end, several through one; fewer tiles than programs."""
    for lengths in ([130], [16, 16, 16], [0, 70, 5, 0, 49, 0], [0, 0]):
        grouped(lengths, programs=programs)
    grouped([100, 7], sight=Sight(sink_H=sinks(4), window=50), programs=programs)


def test_more_sequences_than_are_counted_at_once():
    grouped([3 + i % 5 for i in range(70)], (2, 1, 16), 4)


def test_no_sequence():
    q_BHd = draw(0, 4, 16, dtype=torch.float32)
    cache = draw(2, 16, 2, 16, dtype=torch.float32).unbind()
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    decode.decode(q_BHd, cache, empty.view(0, 1), empty, 16, torch.empty_like(q_BHd))


def latent(
    lengths: list[int], H: int, widths: tuple[int, int], dtype: torch.dtype, tile: Tile | None, block_size: int = 16
) -> None:
    """Against attention with one KV head whose values are its keys, and the rest dropped."""
    width, W = widths[0], sum(widths)
    block_BN, length_B, unused = paged(lengths, block_size)
    q_BHW = draw(len(lengths), H, W, dtype=dtype)
    row = draw(len(unused), 1, W, dtype=dtype)
    row[unused] = torch.nan
    scale = 0.7 * W**-0.5
    got = latent_decode.decode(q_BHW, row, block_BN, length_B, block_size, width, scale, tile)
    cache = row.float(), row.float()
    at = block_BN, length_B.clamp(min=1), block_size, Sight(scale=scale)
    near(got, attention.decode(q_BHW.float(), cache, *at)[..., :width], length_B)


@pytest.mark.parametrize("tile", [None, ROWS, TALL])
@pytest.mark.parametrize(("H", "widths"), [(3, (32, 16)), (16, (24, 8)), (70, (32, 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent(H, widths, dtype, tile):
    latent([70, 0, 1, 33], H, widths, dtype, tile)


MODELS = {"Qwen3": (32, 4, 128), "Mixtral": (32, 8, 128), "Llama-4": (40, 8, 128), "gpt-oss": (64, 8, 64)}


@pytest.mark.skipif(INTERPRETED, reason="too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_models(shape, dtype):
    lengths = [2048, 1, 0, 777, 300, 4096, 64, 65, 1500]
    for block_size in (16, 64):
        grouped(lengths, shape, block_size, dtype)
    grouped(lengths, shape, 16, dtype, Sight(window=128, sink_H=sinks(shape[0])))
    grouped([20_000], shape, 16, dtype, Sight(chunk=8192))


@pytest.mark.skipif(INTERPRETED, reason="too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("H", [8, 16, 20, 64, 96, 128])
def test_latent_models(H, dtype):
    for block_size in (16, 32, 48, 64, 192):
        latent([2048, 1, 0, 777, 300, 4096, 64, 65], H, (512, 64), dtype, None, block_size)


@pytest.mark.skipif(INTERPRETED, reason="too much for the interpreter")
def test_many_sequences():
    """Several a program, some of them empty; cut or whole, since one of them is long or none."""
    lengths = [i * 37 % 700 for i in range(200)]
    grouped(lengths, (32, 4, 128), 16, torch.bfloat16)
    for H in (16, 64, 128):
        latent(lengths, H, (512, 64), torch.bfloat16, None)
        latent([*lengths, 20_000], H, (512, 64), torch.bfloat16, None)
    latent([3000, 5, 0, 9000], 128, (512, 64), torch.float16, None)


HOPPER = not INTERPRETED and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="for Hopper's kernel")
@pytest.mark.parametrize("lengths", [[300] * 200, [1] * 67, [700, 0, 650] * 60], ids=["alike", "short", "not alike"])
def test_many_contexts_stay_whole(lengths, monkeypatch):
    """Nothing is left to join."""
    monkeypatch.setattr(latent_decode, "join", lambda *left: None)
    latent(lengths, 128, (512, 64), torch.bfloat16, None)


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_in_a_graph_that_is_replayed():
    """Nothing is read on the host: the same graph serves other lengths and other blocks."""
    q_BHd = draw(8, 32, 128, dtype=torch.bfloat16)
    row_BHW = draw(8, 16, 576, dtype=torch.bfloat16)
    cache = draw(2, 8 * 1024, 4, 128, dtype=torch.bfloat16).unbind()
    rows = draw(8 * 1024, 1, 576, dtype=torch.bfloat16)
    block_BN = torch.arange(8 * 64, device=DEVICE).view(8, 64)
    length_B = torch.full((8,), 1024, device=DEVICE)
    out = torch.empty_like(q_BHd)

    def both() -> torch.Tensor:
        decode.decode(q_BHd, cache, block_BN, length_B, 16, out)
        return latent_decode.decode(row_BHW, rows, block_BN, length_B, 16, 512, 0.05)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents = both()
    for seed in (3, 4, 5):
        generator = torch.Generator().manual_seed(seed)
        length_B.copy_(torch.randint(0, 1025, (8,), generator=generator))
        block_BN.copy_(torch.randperm(8 * 64, generator=generator).view(8, 64))
        q_BHd.normal_()
        graph.replay()
        torch.cuda.synchronize()
        got = out.clone()
        want = both()
        assert torch.equal(latents, want)
        assert torch.equal(got, out)
        plain = attention.decode(q_BHd.float(), tuple(p.float() for p in cache), block_BN, length_B.clamp(min=1), 16)
        near(got, plain, length_B)
