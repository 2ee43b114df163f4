"""One HTTP request at work: a stream of the engine for each of its prompts, merged into one.

Used by `completions` and `chat_completions`. However the iteration ends, whatever still runs in the engine is aborted.
Knows no wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from nonet.engine.llm import Grown
from nonet.errors import NonetError
from nonet.server.metrics import Metrics, Watch
from nonet.server.prompts import PromptTokens
from nonet.types import CompletionOutput, RequestOutput, SamplingParams, TokenLogprobs, TokensPrompt


class Engine(Protocol):
    """What a job needs of AsyncLLM."""

    def stream(
        self,
        prompt: TokensPrompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        grown: Grown | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...

    async def abort(self, request_id: str, n: int = 1) -> None: ...


@dataclass(slots=True)
class News:
    """What one sequence brought since it was last asked."""

    prompt: int  # which of the request's prompts
    index: int  # of the choice, over all prompts and their n
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    first: bool  # nothing came of this sequence before


class _Cursor:
    """How much of one sequence has been handed out."""

    __slots__ = ("done", "num_text", "num_tokens", "started")

    def __init__(self) -> None:
        self.num_text = self.num_tokens = 0
        self.started = self.done = False

    def take(self, prompt: int, index: int, out: CompletionOutput) -> News | None:
        """What is new, or None."""
        ended = out.finish_reason is not None
        if self.done or (len(out.token_ids) == self.num_tokens and len(out.text) == self.num_text and not ended):
            return None
        news = News(
            prompt,
            index,
            out.text[self.num_text :],
            out.token_ids[self.num_tokens :],
            None if out.logprobs is None else out.logprobs[self.num_tokens :],
            out.finish_reason,
            out.stop_reason,
            not self.started,
        )
        self.num_text, self.num_tokens = len(out.text), len(out.token_ids)
        self.started, self.done = True, ended
        return news


class Jobs:
    """The open jobs of a server, so that a stop can end them."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.open: set[Job] = set()

    async def end_all(self, error: NonetError) -> None:
        """Every open job fails with this error."""
        for job in list(self.open):
            await job.fail(error)


class Job:
    """`params` are one for each prompt, alike but for their max_tokens. `rank` pins a data-parallel rank.

    A `short_cut` gets the new text of a job of one sequence right when it arrives, without a turn of the iteration, if
    nothing but text is new. It returns whether it took it; the first and the last piece always take the long way.
    """

    def __init__(
        self,
        jobs: Jobs,
        request_id: str,
        prompts: Sequence[PromptTokens],
        params: Sequence[SamplingParams],
        rank: int | None = None,
    ) -> None:
        self.request_id, self.prompts, self.params = request_id, prompts, params
        self.n = params[0].n
        self.latest: dict[int, RequestOutput] = {}  # by prompt
        self._jobs, self._rank = jobs, rank
        safe = request_id.replace("#", "-")  # several requests may bear the same X-Request-Id
        self._names = [f"{safe}-{i}-{uuid.uuid4().hex[:12]}" for i in range(len(prompts))]
        self._changed: set[int] = set()
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._running = len(prompts)
        self._grown: Grown | None = None
        self.short_cut: Callable[[str], bool] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def num_cached_tokens(self) -> int:
        return sum(out.num_cached_tokens for out in self.latest.values())

    @property
    def num_output_tokens(self) -> int:
        return sum(len(one.token_ids) for out in self.latest.values() for one in out.outputs)

    async def fail(self, error: Exception) -> None:
        """The iteration ends by raising this."""
        self._error = self._error or error
        self._wake.set()
        for name in self._names:
            await self._jobs.engine.abort(name, self.n)

    async def news(self) -> AsyncGenerator[list[News], None]:
        """What came, whenever something did; what came meanwhile is one piece. Raises what the engine raises."""
        watch = self._jobs.metrics.watch(self.num_prompt_tokens, len(self.prompts) * self.n)
        cursors = [[_Cursor() for _ in range(self.n)] for _ in self.prompts]
        if len(self.prompts) == self.n == 1:
            self._grown = partial(self._cut_short, cursors[0][0], watch)
        self._jobs.open.add(self)
        try:
            async with contextlib.aclosing(self._changes()) as changes:
                async for changed in changes:
                    now = time.perf_counter()
                    found = []
                    for i in changed:
                        for out in self.latest[i].outputs:
                            news = cursors[i][out.index].take(i, i * self.n + out.index, out)
                            if news is not None:
                                watch.came(news.index, len(news.token_ids), news.finish_reason, now)
                                found.append(news)
                    if found:
                        yield found
        except Exception as error:
            self._error = self._error or error
            raise
        finally:
            self._jobs.open.discard(self)
            watch.close(self._error)

    def _cut_short(self, cursor: _Cursor, watch: Watch, out: CompletionOutput) -> bool:
        """An output that grew, by the short cut if there is one: whether that was all."""
        if self.short_cut is None or not cursor.started or self._error is not None:
            return False
        if not self.short_cut(out.text[cursor.num_text :]):
            return False
        tokens = len(out.token_ids)
        watch.came(0, tokens - cursor.num_tokens, None, time.perf_counter())
        cursor.num_text, cursor.num_tokens = len(out.text), tokens
        return True

    async def _changes(self) -> AsyncGenerator[list[int], None]:
        """Which prompts have news in `latest`."""
        if len(self.prompts) > 1:
            async with contextlib.aclosing(self._merged()) as merged:
                async for changed in merged:
                    yield changed
            return
        async with contextlib.aclosing(self._stream(0)) as stream:
            async for self.latest[0] in stream:
                if self._error is not None:
                    raise self._error
                yield [0]

    async def _merged(self) -> AsyncGenerator[list[int], None]:
        """The same for several prompts, each with a task that takes in its stream."""
        tasks = [asyncio.create_task(self._follow(i)) for i in range(len(self.prompts))]
        try:
            while self._running or self._changed:
                await self._wake.wait()
                self._wake.clear()
                if self._error is not None:
                    raise self._error
                changed, self._changed = sorted(self._changed), set()
                yield changed
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _stream(self, i: int) -> AsyncGenerator[RequestOutput, None]:
        prompt = TokensPrompt(prompt_token_ids=self.prompts[i].tokens)
        engine, name = self._jobs.engine, self._names[i]
        return engine.stream(prompt, self.params[i], request_id=name, data_parallel_rank=self._rank, grown=self._grown)

    async def _follow(self, i: int) -> None:
        """Take in what comes for one of several prompts."""
        try:
            async with contextlib.aclosing(self._stream(i)) as stream:
                async for self.latest[i] in stream:
                    self._changed.add(i)
                    self._wake.set()
        except Exception as error:  # noqa: BLE001 - raised where the job is iterated
            self._error = self._error or error
        finally:
            self._running -= 1
            self._wake.set()
