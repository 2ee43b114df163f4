"""What the benchmarks in this process share: the prompts that fit a configuration, and timing requests of an AsyncLLM.

Used by throughput, latency and TensorRT-LLM's form.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from nonet.bench.datasets import Sample
from nonet.bench.metrics import Outcome
from nonet.bench.progress import Progress
from nonet.bench.words import Words
from nonet.config import EngineConfig
from nonet.config.checkpoint import ModelSpec, read_spec
from nonet.engine.llm import AsyncLLM
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import CapacityError, RequestError
from nonet.types import SamplingParams

MakeParams = Callable[[Sample], SamplingParams]


def words_of(config: EngineConfig) -> tuple[Words, int]:
    """A configuration's vocabulary, and how long a request may be. Raises ConfigError or ModelError."""
    spec: ModelSpec = read_spec(config.model.model)
    tokenizer = Tokenizer(config.model.tokenizer or str(spec.folder), config.model.trust_remote_code)
    return Words(tokenizer, spec.vocab_size), config.model.max_model_len or spec.max_position


def warm_ups(todo: Sequence[Sample], count: int, words: Words) -> list[Sample]:
    """`count` requests as long as the first ones of the run, of other tokens: the prefix cache must not know those."""
    rng = np.random.default_rng(0)
    chosen = [todo[i % len(todo)] for i in range(count)]
    return [Sample(words.ids(rng, max(one.prompt_len, 1)), max(one.prompt_len, 1), one.output_len) for one in chosen]


async def drive(
    llm: AsyncLLM,
    todo: Sequence[Sample],
    params: MakeParams,
    *,
    concurrency: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Outcome], float]:
    """Run requests, at most `concurrency` at once: their outcomes in order, and the seconds that all took.

    A request that is refused is an outcome with an error. Raises EngineDeadError.
    """
    room: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
    if concurrency is not None:
        room = asyncio.Semaphore(concurrency)

    async def one(sample: Sample) -> Outcome:
        async with room:
            outcome = await time_request(llm, sample, params(sample))
        if progress is not None:
            progress.step(failed=bool(outcome.error))
        return outcome

    began = perf_counter()
    tasks = [asyncio.ensure_future(one(sample)) for sample in todo]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes, perf_counter() - began


async def time_request(llm: AsyncLLM, sample: Sample, params: SamplingParams) -> Outcome:
    """One request; with n continuations their tokens count together."""
    outcome = Outcome(prompt_len=max(sample.prompt_len, 0), start=perf_counter())
    last = outcome.start
    try:
        async for state in llm.stream(sample.prompt, params):
            now = perf_counter()
            count = sum(len(one.token_ids) for one in state.outputs)
            if count > outcome.output_len:
                if outcome.ttft is None:
                    outcome.ttft = now - outcome.start
                else:
                    outcome.itls.append(now - last)
                last = now
                outcome.output_len = count
            outcome.latency = now - outcome.start
            outcome.prompt_len = len(state.prompt_token_ids)
            outcome.text = state.outputs[0].text
    except (RequestError, CapacityError) as error:
        outcome.error = str(error)
    return outcome
