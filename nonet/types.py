"""What callers hand in and get back: sampling parameters, prompts, outputs.

Used by every floor above; knows no tensors. Names are the field's (vLLM, OpenAI).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import msgspec

from nonet.errors import RequestError

MAX_LOGPROBS = 100


class TokensPrompt(TypedDict):
    """A prompt that is already token ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt | list[int]


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the text must match: exactly one of these. Raises RequestError otherwise. Needs the extra `structured`."""

    json: dict[str, Any] | str | None = None  # a JSON schema
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark's, as llguidance reads it
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise RequestError("structured_outputs", what, f"give exactly one of {', '.join(self.__struct_fields__)}")
        if self.choice is not None and not all(self.choice):
            raise RequestError("structured_outputs.choice", self.choice, "use non-empty texts")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen and when to stop. Raises RequestError for a wrong type or a value out of range.

    Temperature 0 (or below 1e-5) is greedy. `seed` gives the same random numbers whatever else is in the batch.
    `stop` strings are cut from the text unless `include_stop_str_in_output`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16  # None: until the model's length
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # this many most likely tokens beside the sampled one
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        for name in ("stop", "stop_token_ids"):
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, [])
        self._check_types()
        for name, ok, remedy in (
            ("n", self.n >= 1, "use 1 or more"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "use 0 (greedy) to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "use a value in (0, 1]"),
            ("top_k", self.top_k >= -1, "use -1 or 0 (all) or a positive count"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "use a value in [0, 1]"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "use a value in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "use a value in [-2, 2]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "use a value above 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "use 1 or more"),
            ("min_tokens", self.min_tokens >= 0, "use 0 or more"),
            ("min_tokens", self.max_tokens is None or self.min_tokens <= self.max_tokens, "use at most max_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"use 0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"use 0 to {MAX_LOGPROBS}",
            ),
            ("stop", all(self.stop), "use non-empty strings"),
            ("stop", all(s.encode(errors="ignore").decode() == s for s in self.stop), "use strings of valid Unicode"),
            ("logit_bias", all(t >= 0 for t in self.logit_bias or ()), "use token ids, 0 or more"),
            ("min_tokens", not (self.structured_outputs and self.min_tokens), "use 0 with structured_outputs"),
            ("stop_token_ids", all(0 <= t < 1 << 32 for t in self.stop_token_ids), "use token ids, 0 or more"),
        ):
            if not ok:
                raise RequestError(name, getattr(self, name), remedy)

    def _check_types(self) -> None:
        """Here and not where a rank decodes the request: there a wrong type would end the rank."""
        for name, kind in _TYPES:
            value = getattr(self, name)
            try:
                value = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise RequestError(name, value, str(error).replace("Expected", "must be", 1)) from error
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise RequestError(name, value, "use a number of 64 bits")
            msgspec.structs.force_setattr(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


_TYPES = tuple((item.name, item.type) for item in msgspec.structs.fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of one token before penalties and temperature, and its rank (1 = most likely)."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n continuations, as far as it has come. In a stream that goes on, the sequences are views."""

    index: int
    text: str = ""
    token_ids: Sequence[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Sequence[TokenLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort"
    stop_reason: int | str | None = None  # the stop string or token id that ended it


@dataclass(slots=True)
class RequestOutput:
    """A request's result (LLM.generate), or its state so far (AsyncLLM.stream)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    dp_rank: int = 0  # the data-parallel rank that served it
