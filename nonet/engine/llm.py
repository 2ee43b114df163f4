"""The two faces of the engine: `LLM.generate` for scripts, `AsyncLLM.stream` for servers.

Both turn prompts into sequences for the `Client` and chunks back into outputs; neither holds a tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import random
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from nonet.config import EngineConfig, build_config
from nonet.engine import messages as m
from nonet.engine.client import Client
from nonet.engine.front_end import FrontEnd, Item
from nonet.engine.output import RequestState
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import NonetError, RequestError
from nonet.types import CompletionOutput, Prompt, RequestOutput, SamplingParams

# Called on the event loop with the one sequence of a request when it grew and goes on, while the iteration waits. True:
# all is done, and the iteration goes on waiting. The output is the engine's own: read it at once, keep nothing of it.
Grown = Callable[[CompletionOutput], bool]


class _Front:
    """What both faces share: a client, a tokenizer, and turning a request into sequences."""

    def __init__(self, model: str | EngineConfig, **settings: Any) -> None:
        config = model if isinstance(model, EngineConfig) else build_config(model, **settings)
        self._use(Client(config))

    def _use(self, client: FrontEnd) -> None:
        self.client, self.config = client, client.config
        model = self.config.model
        try:
            self.tokenizer = Tokenizer(model.tokenizer or model.model, model.trust_remote_code)
        except BaseException:
            client.close()
            raise
        self._ids = itertools.count()
        seed = self.config.model.seed
        self._random = random.Random(f"{seed} of {client.number}" if client.number else seed)  # each front end its own

    def _request(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> RequestState:
        text = prompt if isinstance(prompt, str) else None
        if params.structured_outputs is not None:
            self.tokenizer.check_structured()
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt)
        if request_id is not None and (not isinstance(request_id, str) or "#" in request_id):
            raise RequestError("request_id", request_id, "use text without '#'")
        if not tokens:
            raise RequestError("prompt", prompt, "must hold at least one token")
        self._check_length(len(tokens), params.max_tokens)
        vocabulary = self.client.spec.vocab_size
        bad = next((t for t in tokens if type(t) is not int or not 0 <= t < vocabulary), None)
        if bad is not None:
            raise RequestError("prompt_token_ids", bad, f"token ids are 0 to {vocabulary - 1}")
        return RequestState(request_id or f"request-{next(self._ids)}", text, tokens, params, self.tokenizer)

    def _check_length(self, prompt: int, max_tokens: int | None) -> None:
        """Refuse what can never run. The last token of an output needs no place in the cache."""
        limit, cache = self.config.model.max_model_len or 0, self.client.cache_tokens
        if prompt >= limit:
            raise RequestError("prompt", f"{prompt} tokens", f"must be shorter than max_model_len ({limit})")
        too_much = f"exceeds the KV cache of {cache} tokens; lower it or raise kv_cache_memory_bytes"
        if prompt > cache:
            raise RequestError("prompt", f"{prompt} tokens", too_much)
        if max_tokens is not None and min(max_tokens, limit - prompt) > cache + 1 - prompt:
            raise RequestError("max_tokens", max_tokens, f"with a prompt of {prompt} tokens {too_much}")

    def _sequences(self, state: RequestState) -> list[m.Add]:
        params, prompt = state.params, len(state.tokens)
        room = min(self.config.model.max_model_len or 0, self.client.cache_tokens + 1) - prompt
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        return [m.Add(name, state.tokens, params, most, seed + i) for i, name in enumerate(state.ids)]

    def close(self) -> None:
        """End the engine and all its processes."""
        self.client.close()


class LLM(_Front):
    """A model ready to generate. Settings are those of the configuration, by name.

    `LLM("nonet-tiny", data_parallel_size=4, enable_expert_parallel=True)`. Raises ConfigError or ModelError.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continuations of one or many prompts (text, token ids, or {"prompt_token_ids": [...]}), in their order.

        A progress bar is drawn on a terminal unless `use_tqdm` is off. Raises RequestError for a bad request (then
        none runs), EngineDeadError if a rank dies.
        """
        many = _as_list(prompts)
        params = sampling_params or SamplingParams()
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise RequestError("sampling_params", f"{len(each)} given", f"give one, or one for each of {len(many)}")
        states = [self._request(prompt, p, None) for prompt, p in zip(many, each, strict=True)]
        arrived: queue.SimpleQueue[list[tuple[RequestState, Item]]] = queue.SimpleQueue()
        sink = arrived.put
        open_states = {state.request_id: state for state in states}
        try:
            for state in states:
                state.dp_rank = self.client.submit(self._sequences(state), sink, key=state)
            with _Progress(len(states), use_tqdm) as progress:
                while open_states:
                    for state, item in arrived.get():
                        if isinstance(item, NonetError):
                            raise item
                        if state.add(item):
                            self.client.abort([item.request_id])
                        progress.tokens(len(item.tokens))
                        if state.finished and state.request_id in open_states:
                            del open_states[state.request_id]
                            progress.request()
        finally:
            self.client.abort([name for state in open_states.values() for name in state.ids])
        return [state.result() for state in states]

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncLLM(_Front):
    """The same engine for asyncio: requests come and go at any time."""

    @classmethod
    def attach(cls, attachment: Mapping[str, Any]) -> AsyncLLM:
        """On an engine that another process started, from its `Client.attachment(i)`. Raises EngineDeadError."""
        llm = cls.__new__(cls)
        llm._use(Client.attach(attachment))
        return llm

    def _use(self, client: FrontEnd) -> None:
        super()._use(client)
        self._spread: _Spread | None = None

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        grown: Grown | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's state each time it grows; the last one is finished. Ending the iteration aborts the request.

        `grown` is a short cut for who has little to do with each token of one sequence (n = 1): see `Grown`.
        What is handed out never changes. Until an output is finished its `token_ids` and `logprobs` are views that read
        like lists (`list(...)` makes one): a copy for each token would cost the square of the stream's length.
        Raises RequestError, CapacityError, or EngineDeadError naming the rank that died.
        """
        state = self._request(prompt, sampling_params or SamplingParams(), request_id)
        loop = asyncio.get_running_loop()
        if self._spread is None or self._spread.loop is not loop:
            self._spread = _Spread(loop)
        arrived = _Arrived(loop, state, self.client, grown)
        state.dp_rank = self.client.submit(self._sequences(state), self._spread, data_parallel_rank, key=arrived)
        try:
            finished = False
            while not finished:
                await arrived.changed()
                result = state.result()
                finished = result.finished  # the state may be, before this was seen
                yield result
        finally:
            if not state.finished:
                self.client.abort(state.ids, arrived)

    async def abort(self, request_id: str, n: int = 1) -> None:
        """End a request by its id (and its n); its stream ends with finish_reason "abort"."""
        self.client.abort([request_id] if n == 1 else [f"{request_id}#{i}" for i in range(n)])

    async def stats(self, reset_load: bool = False) -> list[m.Stats]:
        """Every rank's counters, in rank order. Raises EngineDeadError or CommTimeout."""
        return await asyncio.to_thread(self.client.stats, reset_load)

    @property
    def pending(self) -> list[int]:
        """Tokens outstanding on each data-parallel rank."""
        return self.client.pending

    @property
    def dead(self) -> NonetError | None:
        """Why the engine is dead; None while it lives."""
        return self.client.error

    async def wait_dead(self) -> NonetError:
        """Returns when the engine is dead, with the reason: a rank that died, or that it was closed."""
        loop = asyncio.get_running_loop()
        died: asyncio.Future[NonetError] = loop.create_future()

        def tell(error: NonetError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if died.done() else died.set_result(error))

        take_back = self.client.on_death(tell)
        try:
            return await died
        finally:
            take_back()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)


class _Arrived:
    """What comes for one stream goes into its state at once, and wakes the iteration. On its event loop only."""

    __slots__ = ("_client", "_error", "_grown", "_loop", "_news", "_state", "_waiter")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, state: RequestState, client: FrontEnd, grown: Grown | None
    ) -> None:
        self._loop, self._state, self._client, self._grown = loop, state, client, grown
        self._news = False  # that the iteration has not seen
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Never raises: what goes wrong is raised by `changed`, and other streams go on."""
        waiter = self._waiter
        try:
            if isinstance(item, NonetError):
                raise item
            if self._state.add(item):
                self._client.abort([item.request_id], self)
            if self._grown is not None and waiter is not None and not self._news:
                output = self._state.completions[0].output
                if output.finish_reason is None and self._grown(output):
                    return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this stream's
            self._error = self._error or error
        self._news = True
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def changed(self) -> None:
        """Waits until there is news. Raises what came instead."""
        if not self._news:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False
        if self._error is not None:
            raise self._error


class _Spread:
    """The sink of all streams of one event loop: what a step brought enters the loop by one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def __call__(self, items: list[tuple[_Arrived, Item]]) -> None:
        """From the front end's thread. Raises RuntimeError if the loop is closed."""
        self.loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[_Arrived, Item]]) -> None:
    for arrived, item in items:
        arrived.put(item)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | dict):
        return [prompts]
    many = list(prompts)
    return [many] if many and all(isinstance(t, int) for t in many) else many  # type: ignore[list-item, return-value]


class _Progress:
    """A bar of finished requests with tokens per second, on a terminal."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        self._tokens = 0
        if wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            tokens = TextColumn("{task.fields[tokens]} tokens")
            self._bar = Progress(*columns, tokens, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, tokens=0)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def tokens(self, count: int) -> None:
        self._tokens += count
        if self._bar:
            self._bar.update(self._task, tokens=self._tokens)

    def request(self) -> None:
        if self._bar:
            self._bar.advance(self._task)
