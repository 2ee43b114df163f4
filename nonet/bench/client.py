"""One request to an OpenAI-compatible server: what is sent, and the times at which its tokens come back.

Used by `bench.serve`. A request never raises for what a server does: its Outcome says what went wrong.
"""

from __future__ import annotations

import asyncio
import json
from time import perf_counter
from typing import Any

import msgspec

from nonet.bench.datasets import Sample
from nonet.bench.http import Answer, Http, HttpError
from nonet.bench.metrics import Outcome

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_ERROR_CHARACTERS = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event).decode


class Completions:
    """How requests to one model of one server look. `extra` is merged into every body and wins."""

    def __init__(self, http: Http, path: str, *, chat: bool, model: str, extra: dict[str, Any], timeout: float) -> None:
        self._http, self._path, self._chat, self._timeout = http, path, chat, timeout
        self._fixed = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        self._extra = extra

    def body(self, sample: Sample) -> bytes:
        what: dict[str, Any]
        if self._chat:
            what = {"messages": [{"role": "user", "content": sample.prompt}]}
            what["max_completion_tokens"] = sample.output_len
        else:
            what = {"prompt": sample.prompt, "max_tokens": sample.output_len}
        return json.dumps({**self._fixed, **what, **self._extra}).encode()

    async def ask(self, sample: Sample, request_id: str | None = None) -> Outcome:
        """Send a request and take in its stream. `output_len` stays 0 if the server does not say how many tokens."""
        body = self.body(sample)
        outcome = Outcome(prompt_len=max(sample.prompt_len, 0), start=perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                async with self._http.request("POST", self._path, body, request_id) as answer:
                    if answer.status != 200:
                        outcome.error = await _refusal(answer)
                    else:
                        stream = _Stream(outcome)
                        await answer.each(stream.take)
                        stream.end()
        except HttpError as error:
            outcome.error = str(error)
        except TimeoutError:
            outcome.error = f"no end within {self._timeout:g} s"
        return outcome


async def first_model(http: Http) -> str:
    """The name of the first model that the server lists. Raises HttpError."""
    async with asyncio.timeout(60.0), http.request("GET", "/v1/models") as answer:
        if answer.status != 200:
            raise HttpError(await _refusal(answer))
        try:
            return str(json.loads(await answer.read())["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise HttpError("/v1/models lists no model") from error


async def _refusal(answer: Answer) -> str:
    """An answer that is not 200 as one line: the status and the message of its body."""
    body = (await answer.read()).decode("utf-8", "replace")
    try:
        parsed = json.loads(body)
        message = parsed["error"]["message"] if isinstance(parsed.get("error"), dict) else parsed["message"]
    except (ValueError, LookupError, AttributeError, TypeError):
        message = body
    return f"HTTP {answer.status} {answer.reason}: {' '.join(str(message).split())[:_ERROR_CHARACTERS]}"


class Events:
    """Server-sent events out of the pieces in which they arrive."""

    def __init__(self) -> None:
        self.held = b""  # the beginning of an event

    def add(self, piece: bytes) -> list[bytes]:
        """The data of each event that the piece completes."""
        held = self.held + piece if self.held else piece
        if b"\r" in held:
            held = held.replace(b"\r\n", b"\n")
        *whole, self.held = held.split(b"\n\n")
        return [data for event in whole if (data := _data(event))]


def _data(event: bytes) -> bytes:
    """What an event's lines of data hold."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].strip()
    return b"\n".join([line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")])


class _Stream:
    """Takes a stream into an outcome: times of tokens, text, usage, and how it failed if it did."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome, self._events = outcome, Events()
        self._text: list[str] = []
        self._last = outcome.start
        self._ended = False

    def take(self, piece: bytes) -> None:
        now = perf_counter()
        for data in self._events.add(piece):
            if data == b"[DONE]":
                self._ended = True
            else:
                self._event(data, now)

    def _event(self, data: bytes, now: float) -> None:
        outcome = self._outcome
        try:
            event = _event(data)
        except msgspec.DecodeError as error:
            outcome.error = outcome.error or f"an event is no JSON of a completion: {error}"
            return
        if event.error is not None:
            outcome.error = outcome.error or f"error in the stream: {_message(event.error)}"
        if event.usage is not None:
            outcome.prompt_len = event.usage.prompt_tokens or outcome.prompt_len
            outcome.output_len = event.usage.completion_tokens or outcome.output_len
        for choice in event.choices:
            part, token = _part(choice)
            self._ended = self._ended or choice.finish_reason is not None
            if token or (choice.finish_reason is not None and outcome.ttft is None):
                if outcome.ttft is None:
                    outcome.ttft = now - outcome.start
                else:
                    outcome.itls.append(now - self._last)
                self._last = now
            self._text.append(part)
            outcome.latency = now - outcome.start

    def end(self) -> None:
        """No more comes; the text is whole. Raises HttpError if that was within an event."""
        self._outcome.text = "".join(self._text)
        if self._events.held.strip():
            raise HttpError("the stream ended within an event")
        if not self._ended and not self._outcome.error:
            self._outcome.error = "the stream ended without a finish_reason or [DONE]"


def _part(choice: _Choice) -> tuple[str, bool]:
    """A choice's text, and whether a token came with it: an empty text may be one whose characters are held back."""
    if choice.delta is None:
        return choice.text or "", bool(choice.text) or choice.finish_reason is None
    delta = choice.delta
    part = (delta.reasoning_content or delta.reasoning or "") + (delta.content or "")
    return part, bool(part or delta.tool_calls)


def _message(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:_ERROR_CHARACTERS]
