"""What completions and chat completions have in common: the head of a response, usage, whole or streamed.

Used by `completions`, `chat_completions` and `app`.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nonet.engine.tokenizer import Tokenizer
from nonet.openai.requests import Sampling
from nonet.openai.responses import CachedTokens, ChatChunk, ChatCompletion, Completion, Usage
from nonet.server.http import while_connected
from nonet.server.job import Job, News
from nonet.server.logprobs import LogprobForms
from nonet.server.sse import DONE, EventStream, encode, event


class Answer(ABC):
    """One response in the making."""

    prefix: str  # of its id
    hides_output = False  # `max_tokens` 0: the one token that was drawn is not shown

    def __init__(self, body: Sampling, job: Job, tokenizer: Tokenizer, forms: LogprobForms, model: str) -> None:
        self.body, self.job, self.tokenizer, self.forms, self.model = body, job, tokenizer, forms, model
        self.id = f"{self.prefix}-{job.request_id}"
        self.created = int(time.time())
        options = body.stream_options
        self._last_usage = bool(options and options.include_usage)
        self._every_usage = bool(options and options.continuous_usage_stats) and self._last_usage

    @abstractmethod
    def chunks(self, news: News) -> list[Completion | ChatChunk]:
        """What to stream for this piece of news."""

    @abstractmethod
    def last_chunk(self) -> Completion | ChatChunk:
        """One without choices, for the usage."""

    @abstractmethod
    def complete(self) -> Completion | ChatCompletion:
        """The whole, once the job is done."""

    async def whole(self) -> Completion | ChatCompletion:
        """Run the job to its end."""
        async with contextlib.aclosing(self.job.news()) as coming:
            async for _ in coming:
                pass
        return self.complete()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Run the job, as server-sent events. What came together goes out together."""
        async with contextlib.aclosing(self.job.news()) as coming:
            async for found in coming:
                yield b"".join([event(chunk) for news in found for chunk in self.chunks(news)])
        if self._last_usage:
            last = self.last_chunk()
            last.usage = self.usage()
            yield event(last)
        yield DONE

    def cut_short(self, write: Callable[[bytes], bool]) -> None:
        """Let the job write what brings nothing but text right when it comes, if such events differ in nothing else."""
        body, params = self.body, self.job.params[0]
        more = body.return_token_ids or self._every_usage or params.logprobs is not None or self.hides_output
        if more or len(self.job.prompts) * params.n > 1:
            return
        mark = uuid.uuid4().hex
        (chunk,) = self.chunks(News(0, 0, mark, [], None, None, None, first=False))
        before, after = event(chunk).split(encode(mark))
        self.job.short_cut = lambda text: write(b"%b%b%b" % (before, encode(text), after))

    def usage(self) -> Usage:
        prompt, output = self.job.num_prompt_tokens, 0 if self.hides_output else self.job.num_output_tokens
        return Usage(prompt, output, prompt + output, CachedTokens(self.job.num_cached_tokens))

    def usage_of_chunk(self) -> Usage | None | UnsetType:
        """OpenAI's null where the usage comes last, vLLM's usage so far where it was asked for."""
        return self.usage() if self._every_usage else None if self._last_usage else UNSET

    def token_ids(self, tokens: Sequence[int]) -> list[int] | UnsetType:
        return list(tokens) if self.body.return_token_ids else UNSET

    def prompt_token_ids(self, prompt: int) -> list[int] | UnsetType:
        return self.token_ids(self.job.prompts[prompt].tokens)


async def respond(request: Request, answer: Answer) -> Response:
    """Whole or streamed. What goes wrong before the first token has a status of its own in either case."""
    if not answer.body.stream:
        found = await while_connected(request.receive, answer.whole())
        return Response(msgspec.json.encode(found), media_type="application/json")
    events = answer.events()
    try:
        first = await while_connected(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    stream = EventStream(first, events)
    answer.cut_short(stream.write_now)
    return stream
