"""`nonet bench throughput`: many requests at once through the engine in this process. JSON keys and line are vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from nonet.bench.datasets import Sample, samples
from nonet.bench.engine import drive, warm_ups, words_of
from nonet.bench.options import ThroughputOptions
from nonet.bench.progress import Progress
from nonet.config import EngineConfig
from nonet.engine.llm import LLM, AsyncLLM
from nonet.types import Prompt, SamplingParams


@dataclass
class ThroughputRun:
    """What a run brought. `failed` requests are in no figure."""

    seconds: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    failed: int = 0
    first_error: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def result(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.output_tokens
        return {
            "elapsed_time": self.seconds,
            "num_requests": self.num_requests,
            "total_num_tokens": total,
            "requests_per_second": self.num_requests / self.seconds,
            "tokens_per_second": total / self.seconds,
            "total_prompt_tokens": self.prompt_tokens,
            "total_output_tokens": self.output_tokens,
            "output_tokens_per_second": self.output_tokens / self.seconds,
            "failed": self.failed,
        }


def run(options: ThroughputOptions, config: EngineConfig) -> ThroughputRun:
    """Starts the engine, runs the requests, ends the engine. Raises ConfigError, ModelError, EngineDeadError.

    Every request generates to its full length, as in vLLM: temperature 1, end-of-sequence ignored.
    """
    words, max_len = words_of(config)
    todo = samples(options, words, text=False, max_len=max_len)
    warm = warm_ups(todo, options.num_warmups, words)
    return (_through_async if options.async_engine else _through_llm)(options, config, todo, warm)


def params_for(sample: Sample, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, top_p=1.0, max_tokens=sample.output_len, ignore_eos=True)


def _through_llm(
    options: ThroughputOptions, config: EngineConfig, todo: Sequence[Sample], warm: Sequence[Sample]
) -> ThroughputRun:
    with LLM(config) as llm:
        if warm:
            llm.generate([one.prompt for one in warm], [params_for(one) for one in warm], use_tqdm=False)
        prompts: list[Prompt] = [sample.prompt for sample in todo]
        each = [params_for(sample, options.n) for sample in todo]
        began = perf_counter()
        outputs = llm.generate(prompts, each, use_tqdm=not options.disable_tqdm)
        seconds = perf_counter() - began
    read = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return ThroughputRun(seconds, len(outputs), read, made)


def _through_async(
    options: ThroughputOptions, config: EngineConfig, todo: Sequence[Sample], warm: Sequence[Sample]
) -> ThroughputRun:
    async def main() -> ThroughputRun:
        await drive(llm, warm, params_for)
        with Progress("requests", len(todo), not options.disable_tqdm) as progress:
            outcomes, seconds = await drive(llm, todo, lambda sample: params_for(sample, options.n), progress=progress)
        done = [outcome for outcome in outcomes if not outcome.error]
        error = next((outcome.error for outcome in outcomes if outcome.error), None)
        read, made = sum(o.prompt_len for o in done), sum(o.output_len for o in done)
        return ThroughputRun(seconds, len(done), read, made, len(outcomes) - len(done), error)

    llm = AsyncLLM(config)
    try:
        return asyncio.run(main())
    finally:
        llm.close()
