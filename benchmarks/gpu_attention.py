"""How near attention on one GPU comes to what memory and tensor cores allow, with peers beside it in one run: PyTorch's
own and, where it is installed, FlashInfer, planned beforehand.

Decoding: bytes of keys and values read once, by time, as a share of the bytes a copy moves (read and written) in this
run. Prompts: operations by time. All in CUDA graphs, each call on the next of several caches, so that none lies in the
GPU's own cache. Run: python benchmarks/gpu_attention.py [--only decode|mla|prefill] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from _gpu import in_graph, need_gpus
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nonet.engine.batch import BatchBuilder
from nonet.engine.messages import StepBatch
from nonet.kernels.triton import decode, latent_decode, prefill
from nonet.layers.attention import AttentionBatch, Sight, attend
from nonet.layers.attention_flashinfer import FlashInfer

Row = dict[str, Any]  # of a table: columns by name
DTYPE = torch.bfloat16
ROTATED = 256 << 20  # bytes that calls of one graph touch at least, together: several times the GPU's own cache
# (name, query heads, KV heads, head_dim, window, sinks)
MODELS = (
    ("Qwen3-30B-A3B", 32, 4, 128, None, False),
    ("Mixtral", 32, 8, 128, None, False),
    ("gpt-oss", 64, 8, 64, None, True),
    ("gpt-oss window", 64, 8, 64, 128, True),
)
BATCHES, CONTEXTS, BLOCKS = (1, 16, 32, 64, 256), (2048, 8192), (16, 64)
PROMPTS = {"1 x 4096": [(0, 4096)], "16 x 256": [(0, 256)] * 16, "2048 after 14336": [(14336, 2048)]}
MLA_HEADS, MLA_WIDTH, MLA_ROW = (16, 128), 512, 576  # DeepSeek-V2-Lite or V3 over 8 ranks, DeepSeek-V3
MLA_SCALE = 192**-0.5
FLASHINFER = find_spec("flashinfer") is not None
MOST_OFF = 2e-2  # of the largest number: a peer that is further off computes something else


def copy_bandwidth() -> float:
    """Bytes read and written a microsecond, by the faster of a copy and an elementwise kernel."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    us = min(in_graph([lambda: y.copy_(x)]), in_graph([lambda: torch.mul(x, 1.0, out=y)]))
    return 2 * x.nbytes / us


def paged(batch: int, context: int, block: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """(block_BN, length_B): contexts of one length in blocks that lie anywhere."""
    blocks = -(-context // block)
    order = torch.randperm(batch * blocks, device=device).view(batch, blocks)
    return order, torch.full((batch,), context, device=device)


def rotated(size: int) -> int:
    """How many caches of so many bytes a graph's calls take turns on."""
    return min(64, max(2, -(-ROTATED // size)))


@cache
def builder(block: int, backend: str) -> BatchBuilder:
    device = torch.device("cuda")
    return BatchBuilder(block, 0, 1, device, backend, FlashInfer(block, device) if backend == "flashinfer" else None)


def step_of(spans: Sequence[tuple[int, int]], block: int, backend: str = "triton") -> tuple[AttentionBatch, int]:
    """A step's batch of (tokens before, new tokens), over blocks that lie anywhere, and how many these are."""
    used = [-(-(start + count) // block) for start, count in spans]
    order = iter(torch.randperm(sum(used), generator=torch.Generator().manual_seed(0)).tolist())
    tokens = sum(count for _, count in spans)
    step = StepBatch(
        tokens=[0] * tokens,
        starts=[start for start, _ in spans],
        counts=[count for _, count in spans],
        blocks=[[next(order) for _ in range(count)] for count in used],
    )
    return builder(block, backend).build(step, [tokens]).attention, sum(used)


def by_flashinfer(
    row: Row, q: Tensor, caches: Sequence[tuple[Tensor, ...]], spans: Sequence[tuple[int, int]], block: int
) -> Row:
    """FlashInfer's columns, through nonet's adapter: the same steps, with the same blocks."""
    ours, batch = (step_of(spans, block, backend)[0] for backend in ("triton", "flashinfer"))
    same(attend(q, caches[0], batch), attend(q, caches[0], ours))
    us = in_graph([lambda cache=cache: attend(q, cache, batch) for cache in caches])
    return {"FlashInfer us": us, "FlashInfer / ours": us / row["us"]}


def same(theirs: Tensor, ours: Tensor) -> None:
    off = float((theirs.float() - ours.float()).abs().max() / ours.float().abs().max())
    if not off <= MOST_OFF:
        sys.exit(f"gpu_attention.py: a peer's answer is off by {off:.1e} of the largest number")


def decode_rows(copied: float) -> list[Row]:
    """Grouped-query decoding."""
    rows = []
    for name, H, h, d, window, sinks in MODELS:
        for context in CONTEXTS:
            for batch in BATCHES:
                for block in BLOCKS:
                    row = decode_row((H, h, d), batch, context, block, window, sinks, copied)
                    rows.append({"model": name, "context": context, "batch": batch, "block": block, **row})
    return rows


def decode_row(
    shape: tuple[int, int, int], batch: int, context: int, block: int, window: int | None, sinks: bool, copied: float
) -> Row:
    H, h, d = shape
    seen = min(context, window or context)
    size = 2 * batch * seen * h * d * DTYPE.itemsize
    block_BN, length_B = paged(batch, context, block)
    count = min(rotated(size), max(1, (16 << 30) // (size * context // seen)))
    caches = [torch.randn((2, batch * context, h, d), dtype=DTYPE, device="cuda").unbind() for _ in range(count)]
    q = torch.randn((batch, H, d), dtype=DTYPE, device="cuda")
    sink_H = torch.randn(H, device="cuda") if sinks else None
    out = torch.empty_like(q)

    def ours(cache: tuple[Tensor, ...]) -> None:
        decode.decode(q, cache, block_BN, length_B, block, out, window, None, sink_H, None)

    own = in_graph([lambda cache=cache: ours(cache) for cache in caches])
    row = {"us": own, "GB/s": size / own / 1e3, "of copy": size / own / copied}
    if window is None and not sinks:  # the others have no counterpart there
        whole = [tuple(part.view(batch, context, h, d).transpose(1, 2) for part in cache) for cache in caches]
        query = q.unsqueeze(2)

        def theirs(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

        row["SDPA us"] = in_graph([lambda kv=kv: theirs(*kv) for kv in whole])
        row["SDPA / ours"] = row["SDPA us"] / own
        if FLASHINFER:
            row |= by_flashinfer(row, q, caches, [(context - 1, 1)] * batch, block)
    return row


def mla_rows(copied: float) -> list[Row]:
    """Absorbed latent decoding."""
    rows = []
    for heads in MLA_HEADS:
        for context in CONTEXTS:
            for batch in BATCHES:
                for block in BLOCKS:
                    size = batch * context * MLA_ROW * DTYPE.itemsize
                    block_BN, length_B = paged(batch, context, block)
                    shape = (batch * context, 1, MLA_ROW)
                    caches = [torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(rotated(size))]
                    q = torch.randn((batch, heads, MLA_ROW), dtype=DTYPE, device="cuda")
                    where = block_BN, length_B, block, MLA_WIDTH, MLA_SCALE
                    us = in_graph([lambda c=c, q=q, w=where: latent_decode.decode(q, c, *w) for c in caches])
                    work = 2 * batch * context * heads * (MLA_ROW + MLA_WIDTH) / us / 1e6
                    row: Row = {"heads": heads, "context": context, "batch": batch, "block": block, "us": us}
                    row |= {"GB/s": size / us / 1e3, "of copy": size / us / copied, "TFLOP/s": work}
                    if FLASHINFER:
                        row |= mla_by_flashinfer(row, q, caches, where)
                    rows.append(row)
    return rows


def mla_by_flashinfer(row: Row, q: Tensor, caches: Sequence[Tensor], where: tuple[Any, ...]) -> Row:
    """FlashInfer's columns. nonet has no adapter to this wrapper."""
    import flashinfer

    B, H, _ = q.shape
    block_BN, length_B, block, *_ = where
    space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(space)
    row_B1 = torch.arange(B + 1, dtype=torch.int32)
    blocks = row_B1 * block_BN.shape[1], block_BN.flatten().int(), length_B.int().cpu()
    shape = H, MLA_WIDTH, MLA_ROW - MLA_WIDTH, block
    wrapper.plan(row_B1, *blocks, *shape, False, MLA_SCALE, DTYPE, DTYPE)
    pages = [cache.view(-1, block, MLA_ROW).split((MLA_WIDTH, MLA_ROW - MLA_WIDTH), dim=2) for cache in caches]
    halves = q.split((MLA_WIDTH, MLA_ROW - MLA_WIDTH), dim=2)
    out = torch.empty((B, H, MLA_WIDTH), dtype=DTYPE, device="cuda")
    same(wrapper.run(*halves, *pages[0], out=out), latent_decode.decode(q, caches[0], *where))
    us = in_graph([lambda own=own: wrapper.run(*halves, *own, out=out) for own in pages])
    return {"FlashInfer us": us, "FlashInfer / ours": us / row["us"]}


def prefill_rows() -> list[Row]:
    """Prompts, as a step of the engine attends to them: products that count, by time. Two for each number of a pair of
    a query and a key that it sees. PyTorch's own has keys and values side by side, and only what it has a form for."""
    rows = []
    for name, H, h, d, window, sinks in MODELS:
        for prompts, spans in PROMPTS.items():
            for block in BLOCKS:
                row = prefill_row((H, h, d), spans, block, window, sinks)
                rows.append({"model": name, "prompts": prompts, "block": block, **row})
    return [*rows, *({"model": "DeepSeek-V2-Lite", "prompts": "1 x 4096", **row} for row in latent_prefill_rows())]


def prefill_row(
    shape: tuple[int, int, int], spans: Sequence[tuple[int, int]], block: int, window: int | None, sinks: bool
) -> Row:
    H, h, d = shape
    batch, blocks = step_of(spans, block)
    caches = [torch.randn((2, blocks * block, h, d), dtype=DTYPE, device="cuda").unbind() for _ in range(4)]
    q = torch.randn((sum(count for _, count in spans), H, d), dtype=DTYPE, device="cuda")
    sight = Sight(window=window, sink_H=torch.randn(H, device="cuda") if sinks else None)
    own = in_graph([lambda cache=cache: attend(q, cache, batch, sight) for cache in caches])
    seen = window or 1 << 30
    pairs = sum(min(position + 1, seen) for start, count in spans for position in range(start, start + count))
    row = {"us": own, "TFLOP/s": 4 * pairs * H * d / own / 1e6}
    if window is None and not sinks and {start for start, _ in spans} == {0}:  # of one length, see PROMPTS
        whole = [part[: len(q)].view(len(spans), -1, h, d).transpose(1, 2) for part in caches[0]]
        query = q.view(len(spans), -1, H, d).transpose(1, 2)
        row["PyTorch us"] = fastest_of_torch(query, *whole)
        row["PyTorch / ours"] = row["PyTorch us"] / own
    if window is None and not sinks and FLASHINFER:
        row |= by_flashinfer(row, q, caches, spans, block)
    return row


def fastest_of_torch(q: Tensor, k: Tensor, v: Tensor) -> float:
    def once(kind: SDPBackend) -> None:
        with sdpa_kernel(kind):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    kinds = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    return min(in_graph([lambda kind=kind: once(kind)] * 4) for kind in kinds)


def latent_prefill_rows() -> list[Row]:
    """The plain form's attention, without the product that makes its keys and values."""
    T, H, n, r, width = 4096, 16, 128, 64, 128
    first, count = torch.tensor([[0], [T]], device="cuda")
    calls = []
    for _ in range(4):
        k, v = torch.randn((T, H, n + width), dtype=DTYPE, device="cuda").split((n, width), dim=2)
        shared = torch.randn((T, MLA_ROW), dtype=DTYPE, device="cuda")[:, -r:]
        q = torch.randn((T, H, n + r), dtype=DTYPE, device="cuda")
        out = torch.empty((T, H, width), dtype=DTYPE, device="cuda")
        given = q, k, v, first[:, None], first, count, count, 0, out
        calls.append(lambda given=given, shared=shared: prefill.prefill(*given, shared_k=shared))
    own = in_graph(calls)
    return [{"us": own, "TFLOP/s": T * (T + 1) * H * (n + r + width) / own / 1e6}]


def show(title: str, rows: list[Row]) -> None:
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n" + "".join(f"{name:>15}" for name in names))
    for row in rows:
        cells = (row.get(name, "") for name in names)
        print("".join(f"{c:>15.2f}" if isinstance(c, float) else f"{c:>15}" for c in cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["decode", "mla", "prefill"], help="one of the tables")
    parser.add_argument("--json", type=Path, help="write all rows there, too")
    given = parser.parse_args()
    need_gpus()
    torch.manual_seed(0)
    copied = copy_bandwidth()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if FLASHINFER:
        versions["flashinfer"] = version("flashinfer-python")
    header = {"device": torch.cuda.get_device_name(), **versions, "copy GB/s": round(copied / 1e3)}
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    tables: dict[str, Callable[[], list[Row]]] = {
        "decode": lambda: decode_rows(copied),
        "mla": lambda: mla_rows(copied),
        "prefill": prefill_rows,
    }
    found = {}
    for name, rows in tables.items():
        if given.only in (None, name):
            found[name] = rows()
            show(name, found[name])
    if given.json is not None:
        given.json.write_text(json.dumps({**header, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
