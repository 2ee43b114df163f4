"""`nonet demo`: expert-parallel ranks answer prompts of every kind, and tables show where the tokens went.

Kinds are the files of held-out text that come with the package; prompts are the beginnings of their segments.
Runs on the CPUs of this host. Knows no tensors: load arrives as numbers from the ranks.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rich.console import Console

from nonet.cli.demo_view import View, imbalance_table, rank_table, view_of
from nonet.config import EngineConfig, build_config
from nonet.config.checkpoint import SHIPPED, ModelSpec, read_spec
from nonet.config.resolve import resolve
from nonet.engine.llm import AsyncLLM
from nonet.eplb.load import rank_load
from nonet.eplb.placement import Placement
from nonet.types import RequestOutput, SamplingParams

SEGMENT_END = "\n\f\n"
PROMPT_CHARACTERS = 160
KV_CACHE_BYTES = 64 << 20  # a rank; plenty for a few short requests


@dataclass
class Tally:
    """What the demo counts. Legend: L MoE layers, E experts, R ranks."""

    placement: Placement
    load_LE: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # by kind of text
    outputs: list[RequestOutput] = field(default_factory=list)
    seconds: float = 0.0

    def pairs_LR(self, kind: str | None = None) -> npt.NDArray[np.float64]:
        """(token, expert) pairs that each rank's experts computed, for one kind or for all."""
        load_LE = sum(self.load_LE.values()) if kind is None else self.load_LE[kind]
        return rank_load(np.asarray(load_LE), self.placement)


def run(*, model: str, ranks: int, max_tokens: int, backend: str) -> None:
    """The whole demo. Raises NonetError; whatever happens, no process is left behind."""
    spec = read_spec(model)
    config = demo_config(spec, model, ranks, backend)
    console = Console(highlight=False)
    console.print(started_line(config, spec), soft_wrap=True)
    prompts = prompts_by_kind(max(4, ranks))
    tally = Tally(Placement.contiguous(len(spec.moe_layers), spec.num_experts, ranks))
    start = time.monotonic()
    llm = AsyncLLM(config)
    try:
        console.print(f"ready after {time.monotonic() - start:.1f} s")
        params = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=0)
        asyncio.run(_all_kinds(llm, prompts, params, console, tally))
        tokens = [stats.tokens for stats in llm.client.stats()]
    finally:
        llm.close()
    report(console, tally, tokens)


def demo_config(spec: ModelSpec, model: str, ranks: int, backend: str) -> EngineConfig:
    """Data-parallel attention, expert-parallel MoE, on CPUs. Every value is settled, so it can be shown first."""
    config = build_config(
        model,
        data_parallel_size=ranks,
        enable_expert_parallel=True,
        all2all_backend=backend,
        device="cpu",
        dtype="float32",
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    return resolve(config, spec, num_gpus=0)


def started_line(config: EngineConfig, spec: ModelSpec) -> str:
    ranks, threads = config.world_size, config.runtime.threads_per_rank
    return (
        f"{spec.folder.name}: {len(spec.moe_layers)} MoE layers of {spec.num_experts} experts, top-{spec.top_k}, on "
        f"{ranks} rank{'s' * (ranks > 1)} (DP {ranks}, EP {ranks}), all-to-all {config.moe.all2all_backend}, "
        f"experts {config.moe.expert_backend}, {config.model.dtype}, threads a rank: {threads}"
    )


def prompts_by_kind(count: int) -> dict[str, list[str]]:
    """`count` beginnings of segments from each file of held-out text, by the file's name."""
    found = {}
    for path in sorted((SHIPPED / "heldout").glob("*.txt")):
        segments = [s.strip() for s in path.read_text(encoding="utf-8").split(SEGMENT_END) if s.strip()]
        picks = [segments[i * len(segments) // count % len(segments)] for i in range(count)]
        found[path.stem] = [beginning(segment) for segment in picks]
    return found


def beginning(segment: str) -> str:
    """At most half of a segment, ending before a space where there is one nearby."""
    text = segment[: min(PROMPT_CHARACTERS, len(segment) // 2)]
    return re.sub(r"\s+\S{0,20}$", "", text) or text


async def _all_kinds(
    llm: AsyncLLM, prompts: dict[str, list[str]], params: SamplingParams, console: Console, tally: Tally
) -> None:
    """One kind after the other, so that the load of each can be told apart; its requests at once."""
    llm.client.stats(reset_load=True)
    for kind, texts in prompts.items():
        view = view_of(console, kind, texts)
        start = time.monotonic()
        with view:
            running = (_one_request(llm, text, params, view, row) for row, text in enumerate(texts))
            tally.outputs += await asyncio.gather(*running)
        tally.seconds += time.monotonic() - start
        tally.load_LE[kind] = np.sum([stats.load for stats in llm.client.stats(reset_load=True)], axis=0)


async def _one_request(llm: AsyncLLM, text: str, params: SamplingParams, view: View, row: int) -> RequestOutput:
    async for output in llm.stream(text, params):
        view.update(row, output)
    return output


def report(console: Console, tally: Tally, tokens_by_rank: list[int]) -> None:
    """The tables, and the rate."""
    requests = [sum(output.dp_rank == rank for output in tally.outputs) for rank in range(len(tokens_by_rank))]
    console.print()
    console.print(rank_table(tokens_by_rank, requests, tally.pairs_LR().sum(axis=0)))
    console.print(imbalance_table({**{kind: tally.pairs_LR(kind) for kind in tally.load_LE}, "all": tally.pairs_LR()}))
    made = sum(len(output.outputs[0].token_ids) for output in tally.outputs)
    read = sum(len(output.prompt_token_ids) for output in tally.outputs)
    rate = made / tally.seconds
    console.print(f"{made} tokens generated from {read} of prompts in {tally.seconds:.1f} s: {rate:.0f} tokens/s")
