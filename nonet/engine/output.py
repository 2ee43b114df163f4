"""Assembles a request's result from the chunks its sequences send: text, stop strings, log probabilities.

Used by LLM and AsyncLLM in the front end's process.
"""

from __future__ import annotations

from nonet.engine.messages import Chunk, TokenLogprob
from nonet.engine.prefix import Prefix
from nonet.engine.tokenizer import Tokenizer
from nonet.types import CompletionOutput, Logprob, RequestOutput, SamplingParams, TokenLogprobs


class CompletionState:
    """One of a request's n sequences. `output.text` never shows a part of a stop string that may yet complete."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.output = CompletionOutput(index, token_ids=self._token_ids, logprobs=self._logprobs)
        if self._logprobs is not None:
            self.output.cumulative_logprob = 0.0
        self._params, self._tokenizer = params, tokenizer
        self._detokenizer = tokenizer.stream(params.skip_special_tokens)
        self._text = ""
        self._hold = max((len(s) for s in params.stop), default=1) - 1
        if params.include_stop_str_in_output:
            self._hold = 0

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def snapshot(self) -> CompletionOutput:
        """The output as it is now: what comes later changes nothing in it. Views of its lists until it is finished."""
        out = self.output
        tokens, logprobs = out.token_ids, out.logprobs
        if out.finish_reason is None:
            tokens = Prefix(self._token_ids)
            logprobs = None if self._logprobs is None else Prefix(self._logprobs)
        return CompletionOutput(
            out.index, out.text, tokens, out.cumulative_logprob, logprobs, out.finish_reason, out.stop_reason
        )

    def add(self, chunk: Chunk) -> bool:
        """Take in new tokens. True if a stop string ended the text while the engine goes on: abort it there."""
        out = self.output
        ended = chunk.finish_reason == "stop" and not self._params.include_stop_str_in_output
        hidden = len(chunk.tokens) - 1 if ended else None  # the text of the token that ended it is not shown
        for i, token in enumerate(chunk.tokens):
            self._token_ids.append(token)
            if chunk.logprobs is not None and self._logprobs is not None:
                self._logprobs.append(named(chunk.logprobs[i], self._tokenizer))
                out.cumulative_logprob = (out.cumulative_logprob or 0.0) + chunk.logprobs[i][0][1]
            before = len(self._text)
            if i != hidden:
                self._text += self._detokenizer.add(token)
            if self._stopped(before):
                return chunk.finish_reason is None
        if chunk.finish_reason is not None:
            before = len(self._text)
            self._text += self._detokenizer.flush()
            if not self._stopped(before):
                self._end(self._text, chunk.finish_reason, chunk.stop_token)
        else:
            out.text = self._text[: max(0, len(self._text) - self._hold)]
        return False

    def _stopped(self, before: int) -> bool:
        """Whether the text after `before` completes a stop string; it then ends there."""
        if not self._params.stop or len(self.output.token_ids) < self._params.min_tokens:
            return False
        places = ((self._text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._params.stop)
        hits = [(at, stop) for at, stop in places if at >= 0]
        if not hits:
            return False
        at, stop = min(hits)
        self._end(self._text[: at + len(stop) * self._params.include_stop_str_in_output], "stop", stop)
        return True

    def _end(self, text: str, reason: str, stop: int | str | None) -> None:
        self.output.text, self.output.finish_reason, self.output.stop_reason = text, reason, stop


class RequestState:
    """A request and its n sequences, whose ids are `ids`."""

    def __init__(
        self, request_id: str, prompt: str | None, tokens: list[int], params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.request_id, self.prompt, self.tokens, self.params = request_id, prompt, tokens, params
        self.ids = [request_id] if params.n == 1 else [f"{request_id}#{i}" for i in range(params.n)]
        self.completions = [CompletionState(i, params, tokenizer) for i in range(params.n)]
        self.num_cached = 0
        self.dp_rank = 0
        self._tokenizer = tokenizer
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def add(self, chunk: Chunk) -> bool:
        """Take in a chunk of one sequence; True if the engine should abort that sequence."""
        index = self.ids.index(chunk.request_id)
        if self.completions[index].finished:
            return False
        self.num_cached = max(self.num_cached, chunk.num_cached)
        if index == 0 and chunk.prompt_logprobs and self.prompt_logprobs is not None:
            new = [named(entry, self._tokenizer) for entry in chunk.prompt_logprobs]
            self.prompt_logprobs = [*self.prompt_logprobs, *new]  # a new list: the old one was handed out
        return self.completions[index].add(chunk)

    def result(self) -> RequestOutput:
        """The request as it is now; the caller may keep it."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.tokens,
            outputs=[completion.snapshot() for completion in self.completions],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached,
            dp_rank=self.dp_rank,
        )


def named(entries: list[TokenLogprob], tokenizer: Tokenizer) -> TokenLogprobs:
    """By token id, with each token's text."""
    return {token: Logprob(value, rank, tokenizer.decode([token], False)) for token, value, rank in entries}
