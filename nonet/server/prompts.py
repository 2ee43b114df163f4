"""From a request's body to what the engine takes: token ids, and SamplingParams.

Used by the routes. Knows limits (length, room in the cache) so that what can never run is refused before it is sent.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nonet.engine.tokenizer import Tokenizer
from nonet.errors import RequestError
from nonet.openai.fields import Shown
from nonet.openai.requests import ChatCompletionRequest, CompletionRequest, Sampling, StructuredOutputs
from nonet.types import SamplingParams, StructuredOutputsParams

MAX_SEQUENCES = 4096  # prompts x n of one request
_LONG_TEXT = 20_000  # characters; longer ones are tokenized beside the event loop
_AS_THEY_ARE = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "prompt_logprobs", "logit_bias",
)  # fmt: skip
_FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json


@dataclass(frozen=True)
class Limits:
    """Most tokens of prompt and output: what the model takes, and what the cache of one rank holds."""

    max_model_len: int
    cache_tokens: int | None  # None: not known

    @property
    def most(self) -> int:
        return min(self.max_model_len, self.cache_tokens or self.max_model_len)


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as token ids, and as text if it came as such."""

    tokens: list[int]
    text: str | None


class Encoder:
    """Text to token ids, beside the event loop if it is long."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def encode(self, text: str, special: bool = True) -> list[int]:
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._encode, text, special)
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        backend = self._tokenizer.backend
        if special or backend is None:
            return self._tokenizer.encode(text)
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise RequestError("prompt", Shown(text), "is not valid Unicode (half of a surrogate pair?)") from error

    async def prompts(self, given: list[str] | list[list[int]], special: bool) -> list[PromptTokens]:
        """Every prompt of a request. Raises RequestError."""
        found = []
        for one in given:
            if isinstance(one, str):
                found.append(PromptTokens(await self.encode(one, special), one))
                await asyncio.sleep(0)  # others have their turn between prompts
            else:
                found.append(PromptTokens(one, None))
        return found


def truncated(
    prompts: list[PromptTokens], keep: int | None, max_tokens: int | None, limits: Limits
) -> list[PromptTokens]:
    """The prompts' last `keep` tokens; -1: as many as leave room for the output."""
    if keep is None:
        return prompts
    if keep == 0:
        raise RequestError("truncate_prompt_tokens", 0, "use 1 or more, or -1 for what fits")
    keep = keep if keep > 0 else max(1, limits.most - (max_tokens or 1))
    return [PromptTokens(one.tokens[-keep:], one.text if len(one.tokens) <= keep else None) for one in prompts]


def checkpoint_defaults(folder: str) -> dict[str, Any]:
    """Sampling defaults that the model's authors set, as vLLM takes them."""
    path = Path(folder) / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        found = {}
    given = {name: found.get(name) for name in _FROM_CHECKPOINT if isinstance(found, dict)}
    return {name: value for name, value in given.items() if type(value) in (int, float)}


def sampling_params(body: Sampling, defaults: dict[str, Any]) -> SamplingParams:
    """The engine's parameters. Raises RequestError naming the field of the body."""
    values = dict(defaults)
    values.update((name, value) for name in _AS_THEY_ARE if (value := getattr(body, name)) is not None)
    values["max_tokens"], name = body.max_tokens, "max_tokens"
    if isinstance(body, ChatCompletionRequest):
        if body.max_completion_tokens is not None:
            values["max_tokens"], name = body.max_completion_tokens, "max_completion_tokens"
        values["logprobs"] = _chat_logprobs(body)
    elif isinstance(body, CompletionRequest):
        values.update(_completion_values(body))
    values["structured_outputs"] = _structured(body)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", "given", "goes with stream = true")
    try:
        return SamplingParams(**values)
    except RequestError as error:
        field = name if error.field == "max_tokens" else error.field
        raise RequestError(field, Shown(error.value), error.remedy) from None


def _chat_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs", body.top_logprobs, "goes with logprobs = true")
    return (body.top_logprobs or 0) if body.logprobs else None


def _completion_values(body: CompletionRequest) -> dict[str, Any]:
    """OpenAI's 16 tokens by default; with `echo`, none are needed and the prompt's log probabilities are."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of", body.best_of, "not supported; leave it out, or use the value of n")
    values: dict[str, Any] = {"max_tokens": 16 if body.max_tokens is None else body.max_tokens}
    values["logprobs"] = body.logprobs
    if body.echo:
        values["max_tokens"] = values["max_tokens"] or 1  # 0: one is drawn and not shown
        if body.logprobs is not None:
            values["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return values


def _structured(body: Sampling) -> StructuredOutputsParams | None:
    """From OpenAI's response_format or vLLM's fields, of which one may be given."""
    found: dict[str, dict[str, Any]] = {}
    form = body.response_format
    if form is not None and form.type == "json_object":
        found["response_format"] = {"json_object": True}
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.json_schema is None:
            raise RequestError("response_format.json_schema.schema", None, "is required with type json_schema")
        found["response_format"] = {"json": form.json_schema.json_schema}
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{kind}")) is not None:
            found[f"guided_{kind}"] = {kind: value}
    if body.structured_outputs is not None:
        found["structured_outputs"] = _given(body.structured_outputs)
    if len(found) > 1:
        first, second = list(found)[:2]
        raise RequestError(second, "given", f"cannot go with {first}; give one of them")
    return StructuredOutputsParams(**next(iter(found.values()))) if found else None


def _given(body: StructuredOutputs) -> dict[str, Any]:
    values = {"json": body.json_schema, "regex": body.regex, "choice": body.choice, "grammar": body.grammar}
    return {**values, "json_object": body.json_object or None}


def check_count(prompts: int, n: int) -> None:
    """Raise RequestError if one request asks for too many sequences."""
    if prompts * n > MAX_SEQUENCES:
        remedy = f"at most {MAX_SEQUENCES} sequences a request; send several"
        field, value = ("n", n) if prompts == 1 else ("prompt", f"{prompts} prompts x n = {n}")
        raise RequestError(field, Shown(value), remedy)


def settle_length(params: SamplingParams, prompt: PromptTokens, limits: Limits) -> SamplingParams:
    """With `max_tokens` as asked, or all there is room for. Raises RequestError if it cannot fit."""
    size, most = len(prompt.tokens), limits.most
    room = most - size
    if room < 1:
        bound = "max_model_len" if most == limits.max_model_len else "the KV cache"
        raise RequestError("prompt", f"{size} tokens", f"must be shorter than {bound} ({most})")
    if params.max_tokens is None:
        return msgspec.structs.replace(params, max_tokens=room)
    if params.max_tokens > room:
        remedy = f"with a prompt of {size} tokens it exceeds {most}; use at most {room}"
        raise RequestError("max_tokens", params.max_tokens, remedy)
    return params
