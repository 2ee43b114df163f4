"""`nonet bench latency`: how long one batch takes, over and over, in this process. Output and JSON keys are vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from nonet.bench.datasets import Sample, check_length
from nonet.bench.engine import words_of
from nonet.bench.options import LatencyOptions
from nonet.bench.progress import Progress
from nonet.config import EngineConfig
from nonet.engine.llm import LLM
from nonet.types import Prompt, SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass
class LatencyRun:
    """Seconds of each timed batch."""

    latencies: Sequence[float]

    @property
    def percentiles(self) -> dict[int, float]:
        return {p: float(np.percentile(self.latencies, p)) for p in PERCENTILES}

    @property
    def result(self) -> dict[str, Any]:
        percentiles = {str(p): seconds for p, seconds in self.percentiles.items()}
        return {
            "avg_latency": float(np.mean(self.latencies)),
            "latencies": list(self.latencies),
            "percentiles": percentiles,
        }


def run(options: LatencyOptions, config: EngineConfig) -> LatencyRun:
    """Starts the engine, times the batches, ends the engine. Raises ConfigError, ModelError, EngineDeadError.

    Prompts are random tokens, new ones for each batch, or the prefix cache would answer for the engine.
    """
    words, max_len = words_of(config)
    check_length(0, Sample([], options.input_len, options.output_len), max_len)
    rng = np.random.default_rng(options.seed)
    params = SamplingParams(n=options.n, temperature=1.0, top_p=1.0, max_tokens=options.output_len, ignore_eos=True)
    latencies: list[float] = []
    rounds = options.num_iters_warmup + options.num_iters
    with LLM(config) as llm, Progress("batches", rounds, not options.disable_tqdm) as progress:
        for _ in range(rounds):
            prompts: list[Prompt] = [words.ids(rng, options.input_len) for _ in range(options.batch_size)]
            began = perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            latencies.append(perf_counter() - began)
            progress.step()
    return LatencyRun(latencies[options.num_iters_warmup :])
