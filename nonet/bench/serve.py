"""`nonet bench serve`: sends requests to an OpenAI-compatible server at the times they are due and reports what came.

Knows the server by its address only, whatever program it is. Never imports the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nonet.bench import metrics, rates
from nonet.bench.client import CHAT, COMPLETIONS, Completions, first_model
from nonet.bench.datasets import Sample, samples
from nonet.bench.http import Http, HttpError
from nonet.bench.lag import Lag
from nonet.bench.metrics import Outcome
from nonet.bench.options import ServeOptions
from nonet.bench.progress import Progress
from nonet.bench.words import Words
from nonet.config.checkpoint import find_folder
from nonet.engine.tokenizer import Tokenizer
from nonet.errors import ConfigError

DETAILS = (
    "input_lens", "output_lens", "start_times", "ttfts", "itls", "latencies", "queue_times", "generated_texts",
    "errors",
)  # fmt: skip
_RETRY_S = 0.5
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


@dataclass
class ServeRun:
    """What a run brought: vLLM's result, and what else to tell the user."""

    result: dict[str, Any]
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    @property
    def first_error(self) -> str | None:
        return next((outcome.error for outcome in self.outcomes if outcome.error), None)


async def run(options: ServeOptions, api_key: str | None = None) -> ServeRun:
    """The whole benchmark. Raises ConfigError for wrong options and for a server that cannot be asked at all."""
    wanted = metrics.metrics_from(options.percentile_metrics)
    percentiles = metrics.percentiles_from(options.metric_percentiles)
    goodput = metrics.goodput_from(options.goodput or [])
    metadata = pairs("--metadata", options.metadata)
    due = rates.arrivals(options.num_prompts, options, options.seed)
    path, prefix = endpoint(options), request_id_prefix(options)
    http = Http(base_url(options), headers(options, api_key), insecure=options.insecure)
    _more_files(options.max_concurrency or options.num_prompts)
    try:
        model = options.served_model_name or options.model or await _first_model(http)
        words = Words(_tokenizer(options, model))
        todo = samples(options, words, text=True)
        server = Completions(
            http, path, chat=options.backend == "openai-chat", model=model, extra=extra(options),
            timeout=options.request_timeout_sec,
        )  # fmt: skip
        await _ready(server, todo[0], options.ready_check_timeout_sec)
        await _warm_up(server, todo[0], options)
        outcomes, duration, lag = await load(server, todo, due, options, prefix)
    finally:
        await http.close()
    notes = _count_tokens(outcomes, words)
    if warning := lag.warning(metrics.values_of("itl", outcomes), timed=any(due)):
        notes.append(warning)
    figures = metrics.summary(outcomes, duration, metrics=wanted, percentiles=percentiles, goodput=goodput)
    result = {**_about(options, model), **metadata, **figures, **lag.figures(), **_details(outcomes)}
    return ServeRun(result, outcomes, notes)


async def load(
    server: Completions, todo: Sequence[Sample], due: Sequence[float], options: ServeOptions, prefix: str
) -> tuple[list[Outcome], float, Lag]:
    """Send each request when it is due, or when concurrency allows. Outcomes in order, seconds, the client's lag."""
    room: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
    if options.max_concurrency is not None:
        room = asyncio.Semaphore(options.max_concurrency)
    with Progress("requests", len(todo), not options.disable_tqdm) as progress:
        async with Lag() as lag, asyncio.TaskGroup() as group:
            began = last = time.perf_counter()

            async def one(number: int, sample: Sample, arrival: float) -> Outcome:
                nonlocal last
                arrived = time.perf_counter()
                lag.starts.append(arrived - arrival)
                async with room:
                    outcome = await server.ask(sample, f"{prefix}{number}")
                last = time.perf_counter()
                outcome.queue_time = outcome.start - arrived
                progress.step(failed=bool(outcome.error))
                return outcome

            tasks = []
            for number, (sample, seconds) in enumerate(zip(todo, due, strict=False)):
                wait = began + seconds - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(number, sample, began + seconds)))
        return [task.result() for task in tasks], last - began, lag


# ---------------------------------------------------------------- before the run


def base_url(options: ServeOptions) -> str:
    name = f"[{options.host}]" if ":" in options.host else options.host
    return options.base_url or f"http://{name}:{options.port}"


def endpoint(options: ServeOptions) -> str:
    """The path of requests. Raises ConfigError if it is the other kind's."""
    chat = options.backend == "openai-chat"
    path = options.endpoint or (CHAT if chat else COMPLETIONS)
    if not path.startswith("/"):
        raise ConfigError("--endpoint", path, "begins with /, as /v1/completions")
    if chat != path.endswith("chat/completions"):
        remedy = "speaks completions; use --backend openai" if chat else "speaks chat; use --backend openai-chat"
        raise ConfigError("--endpoint", path, remedy)
    return path


def request_id_prefix(options: ServeOptions) -> str:
    """What the id of each request begins with. Raises ConfigError."""
    prefix = options.request_id_prefix
    if prefix is not None and not (prefix.isascii() and prefix.isprintable()):
        raise ConfigError("--request-id-prefix", prefix, "use printable ASCII")
    return prefix if prefix is not None else f"bench-{uuid.uuid4().hex[:8]}-"


def headers(options: ServeOptions, api_key: str | None) -> dict[str, str]:
    """What the user gives wins over the key."""
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return key | pairs("--header", options.header)


def pairs(flag: str, words: Sequence[str] | None) -> dict[str, str]:
    """KEY=VALUE words as a mapping. Raises ConfigError naming the flag."""
    out = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(flag, word, "use KEY=VALUE")
        out[key.strip()] = value.strip()
    return out


def extra(options: ServeOptions) -> dict[str, Any]:
    """Fields of each body that the options ask for; --extra-body wins."""
    body: dict[str, Any] = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    if options.ignore_eos or options.dataset_name == "random":
        body["ignore_eos"] = True
    if options.logprobs is not None:
        body |= {"logprobs": options.logprobs}
        if options.backend == "openai-chat":
            body |= {"logprobs": True, "top_logprobs": options.logprobs}
    return body | (options.extra_body or {})


def _tokenizer(options: ServeOptions, model: str) -> Tokenizer | None:
    """The one asked for; else the model's, if the model's name is a folder here or a shipped one's."""
    if options.skip_tokenizer_init:
        return None
    name = options.tokenizer or options.model or model
    if Path(name, "tokenizer.json").is_file():
        return Tokenizer(name)
    try:
        folder = find_folder(name)
    except ConfigError as error:
        if options.tokenizer is None:
            return None
        raise ConfigError("--tokenizer", name, "no such folder; give one with tokenizer.json") from error
    tokenizer = Tokenizer(str(folder), options.trust_remote_code)
    if tokenizer.backend is None and options.tokenizer is not None:
        raise ConfigError("--tokenizer", name, "the folder has no tokenizer.json")
    return tokenizer


async def _first_model(http: Http) -> str:
    try:
        return await first_model(http)
    except (HttpError, TimeoutError) as error:
        remedy = f"could not be asked of the server ({error}); check its address, and the key in OPENAI_API_KEY"
        raise ConfigError("--model", None, remedy) from error


async def _ready(server: Completions, sample: Sample, seconds: float) -> None:
    """Repeat a request until it succeeds. Raises ConfigError with the last error when the time is over."""
    until = time.monotonic() + seconds
    while seconds:
        outcome = await server.ask(sample)
        if not outcome.error:
            return
        if time.monotonic() + _RETRY_S > until:
            raise ConfigError("--ready-check-timeout-sec", seconds, f"the server is not ready: {outcome.error}")
        await asyncio.sleep(_RETRY_S)


async def _warm_up(server: Completions, sample: Sample, options: ServeOptions) -> None:
    """Requests that are not counted; a failure shows again in the run, where it is counted."""
    room = asyncio.Semaphore(options.max_concurrency or max(1, options.num_warmups))

    async def one() -> None:
        async with room:
            await server.ask(sample)

    await asyncio.gather(*(one() for _ in range(options.num_warmups)))


def _more_files(wanted: int) -> None:
    """Let this process open as many sockets as there will be requests at once, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + 256
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need if hard == resource.RLIM_INFINITY else min(need, hard), hard))


# ---------------------------------------------------------------- after the run


def _count_tokens(outcomes: Sequence[Outcome], words: Words) -> list[str]:
    """Count what the server did not: by the tokenizer, else by arrivals. Says so."""
    uncounted = [o for o in outcomes if not o.error and not o.output_len and o.ttft is not None]
    for outcome in uncounted:
        outcome.output_len = max(1, words.count(outcome.text)) if words.can_count else 1 + len(outcome.itls)
    if not uncounted:
        return []
    how = "by the tokenizer" if words.can_count else "one an event (no tokenizer)"
    return [f"the server sent no usage for {len(uncounted)} requests; their output tokens were counted {how}"]


def _about(options: ServeOptions, model: str) -> dict[str, Any]:
    """What was run, under vLLM's keys."""
    about: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": options.model or model,
        "tokenizer_id": None if options.skip_tokenizer_init else options.tokenizer or options.model or model,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    if options.ramp_up_strategy:
        names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        about |= {name: getattr(options, name) for name in names}
    return about


def _details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What --save-detailed keeps: lists with an entry for each request."""
    return {
        "input_lens": [o.prompt_len for o in outcomes],
        "output_lens": [o.output_len for o in outcomes],
        "start_times": [o.start for o in outcomes],
        "ttfts": [o.ttft or 0.0 for o in outcomes],
        "itls": [o.itls for o in outcomes],
        "latencies": [o.latency for o in outcomes],
        "queue_times": [o.queue_time for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def saved(result: Mapping[str, Any], detailed: bool) -> dict[str, Any]:
    """What goes into the file."""
    return {key: value for key, value in result.items() if detailed or key not in DETAILS}


def result_path(options: ServeOptions, result: Mapping[str, Any]) -> Path:
    """Where the result goes; the name is vLLM's."""
    label, base, date = options.label or options.backend, str(result["model_id"]).split("/")[-1], result["date"]
    rate = f"{options.request_rate}qps"
    if options.ramp_up_strategy:
        rate = f"ramp-up-{options.ramp_up_strategy}-{options.ramp_up_start_rps}qps-{options.ramp_up_end_rps}qps"
    concurrency = f"-concurrency{options.max_concurrency}" if options.max_concurrency is not None else ""
    name = options.result_filename or f"{label}-{rate}{concurrency}-{base}-{date}.json"
    return (options.result_dir or Path()) / name
