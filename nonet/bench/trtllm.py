"""`nonet bench --model NAME --model_path DIR throughput ...`: TensorRT-LLM's form of the throughput benchmark.

The words are those of its command line, the JSON keys those of its report. Words about the engine (`--tp`, `--ep`,
`--extra_llm_api_options` ...) stay with the configuration, which knows them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from nonet.bench.datasets import Sample, check_length, json_lines, output_tokens
from nonet.bench.engine import drive, warm_ups, words_of
from nonet.bench.metrics import Outcome
from nonet.bench.options import Options
from nonet.bench.progress import Progress
from nonet.bench.words import Words
from nonet.config import EngineConfig
from nonet.engine.llm import AsyncLLM
from nonet.errors import ConfigError
from nonet.types import SamplingParams

# What its command line knows and this one cannot do.
REFUSED = {
    "engine_dir": "there are no built engines; give --model_path DIR",
    "beam_width": "there is no beam search",
    "modality": "only text",
    "max_input_len": "only text; prompts are as long as the data set says",
    "data_device": "only text",
    "cluster_size": "there are no expert clusters",
    "medusa_choices": "there is no speculative decoding",
    "iteration_log": "there is no log of iterations; `/metrics` of a server shows them",
    "request_json": "requests are not reported one by one; use nonet bench serve --save-detailed",
    "output_json": "texts are not written; use nonet bench serve --save-detailed",
    "scheduler_policy": "there is one policy: what does not fit is preempted and computed again",
    "target_input_len": "nothing is tuned by it",
    "target_output_len": "nothing is tuned by it",
    "enable_chunked_context": "long prompts are always chunked, by --max_num_tokens",
    "sampler_options": "sampling is by the defaults",
    "custom_module_dirs": "there are no custom modules",
    "workspace": "no files are made",
    "log_level": "there is no such setting",
    "revision": "nothing is downloaded",
}
RENAMED = {"--max_num_tokens": "--max-num-batched-tokens"}  # ours of that name bounds a pass through the experts
PERCENTS = (50, 90, 95, 99)
_RULE = "=" * 59


class TrtllmOptions(Options):
    title: ClassVar[str] = "Run"
    underscores: ClassVar[bool] = True

    dataset: Path = Field(
        description='File of JSON lines: "task_id", "prompt" or "input_ids", and "output_tokens".',
    )
    num_requests: int = Field(0, ge=0, description="Take this many requests of the file. 0: all.")
    warmup: int = Field(2, ge=0, description="Requests made first and not counted.")
    concurrency: int = Field(-1, ge=-1, description="Requests under way at once. 0 or less: no limit.")
    eos_id: int = Field(-1, ge=-1, description="The token that ends an output. -1: none; outputs have full length.")
    streaming: bool = Field(False, description="Report the times to the first and to each further token too.")
    report_json: Path | None = Field(None, description="Write the report to this file.")
    disable_tqdm: bool = Field(False, description="No progress bar. It is drawn on a terminal only.")


def engine_arguments(rest: Sequence[str]) -> list[str]:
    """The remaining arguments as the configuration reads them."""
    out = []
    for word in rest:
        flag, equals, value = word.partition("=")
        folded = flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag
        out.append(RENAMED.get(folded, flag) + equals + value)
    return out


def dataset(options: TrtllmOptions, words: Words, max_len: int | None) -> list[Sample]:
    """The requests of the file. Raises ConfigError naming the line."""
    out: list[Sample] = []
    for number, entry in json_lines(options.dataset, "--dataset"):
        if options.num_requests and len(out) == options.num_requests:
            break
        where, prompt = f"{options.dataset}:{number}", entry.get("input_ids", entry.get("prompt"))
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not prompt or not (ids or isinstance(prompt, str)):
            raise ConfigError("--dataset", where, 'needs a "prompt" that is text, or "input_ids", a list of token ids')
        length = len(prompt) if isinstance(prompt, list) else words.count(prompt)
        sample = Sample(prompt, length, output_tokens(options.dataset, number, entry, "--dataset"))
        check_length(len(out), sample, max_len)
        out.append(sample)
    if not out or len(out) < options.num_requests:
        raise ConfigError("--dataset", str(options.dataset), f"holds {len(out)} requests; give one with more")
    return out


def params_for(options: TrtllmOptions, sample: Sample) -> SamplingParams:
    """Greedy, to the length that the file asks for or to that token."""
    stop = [] if options.eos_id < 0 else [options.eos_id]
    return SamplingParams(temperature=0.0, max_tokens=sample.output_len, ignore_eos=True, stop_token_ids=stop)


def run(options: TrtllmOptions, config: EngineConfig) -> tuple[dict[str, Any], list[Outcome]]:
    """Starts the engine, runs the file's requests, ends the engine: the report and what became of each request.

    Raises ConfigError, ModelError, EngineDeadError.
    """
    words, max_len = words_of(config)
    todo = dataset(options, words, max_len)
    warm = warm_ups(todo, options.warmup, words)
    concurrency = options.concurrency if options.concurrency > 0 else None

    def make(sample: Sample) -> SamplingParams:
        return params_for(options, sample)

    async def main() -> tuple[list[Outcome], float]:
        await drive(llm, warm, make, concurrency=concurrency)
        with Progress("requests", len(todo), not options.disable_tqdm) as progress:
            return await drive(llm, todo, make, concurrency=concurrency, progress=progress)

    llm = AsyncLLM(config)
    try:
        outcomes, seconds = asyncio.run(main())
        return report(options, llm.config, outcomes, seconds), outcomes
    finally:
        llm.close()


# ---------------------------------------------------------------- the report


def report(options: TrtllmOptions, config: EngineConfig, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Figures under its keys; failed requests are counted beside and are in no figure."""
    done = [outcome for outcome in outcomes if not outcome.error]
    count, made, read = len(done), sum(o.output_len for o in done), sum(o.prompt_len for o in done)
    latencies = [o.latency for o in done]
    parallel = config.parallel
    out: dict[str, Any] = {
        "engine": {"model": config.model.model, "backend": "nonet", "dtype": config.model.dtype},
        "world_info": {
            "tp_size": parallel.tensor_parallel_size,
            "dp_size": parallel.data_parallel_size,
            "pp_size": 1,
            "ep_size": config.world_size if parallel.enable_expert_parallel else 1,
            "world_size": config.world_size,
            "max_batch_size": config.schedule.max_num_seqs,
            "max_num_tokens": config.schedule.max_num_batched_tokens,
        },
        "request_info": {
            "num_requests": count,
            "num_failed_requests": len(outcomes) - count,
            "avg_num_concurrent_requests": sum(latencies) / seconds,
            "avg_input_length": read / max(count, 1),
            "avg_output_length": made / max(count, 1),
        },
        "performance": {
            "total_latency_ms": seconds * 1000,
            "avg_request_latency_ms": _mean(latencies) * 1000,
            "request_throughput_req_s": count / seconds,
            "system_output_throughput_tok_s": made / seconds,
            "system_total_throughput_tok_s": (made + read) / seconds,
            "output_throughput_per_user_tok_s": _mean([o.output_len / o.latency for o in done if o.latency]),
            "output_throughput_per_gpu_tok_s": made / seconds / config.world_size,
            "request_latency_percentiles_ms": spread(latencies, 1000),
        },
    }
    if options.streaming:
        ttft = [o.ttft for o in done if o.ttft is not None]
        tpot = [gap for o in done if (gap := o.tpot) is not None]
        speeds = [1 / gap for gap in tpot if gap > 0]
        out["streaming_metrics"] = {
            "token_output_speed_tok_s": _mean(speeds),
            "avg_ttft_ms": _mean(ttft) * 1000,
            "avg_tpot_ms": _mean(tpot) * 1000,
            "tpot_percentiles": spread(tpot, 1000),
            "ttft_percentiles": spread(ttft, 1000),
            "gen_tps_percentiles": spread(speeds, 1),
        }
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def spread(values: Sequence[float], scale: float) -> dict[str, float]:
    """Percentiles, least, most and average of values x scale."""
    scaled = np.asarray(values or [0.0]) * scale
    percents = {f"p{p}": float(np.percentile(scaled, p)) for p in PERCENTS}
    return percents | {
        "minimum": float(scaled.min()), "maximum": float(scaled.max()), "average": float(scaled.mean()),
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[str]:
    """The report as lines, in the order that its users know."""
    world, requests, speed = found["world_info"], found["request_info"], found["performance"]
    lines = [_RULE, "= WORLD + RUNTIME INFORMATION", _RULE]
    for label, key in (
        ("TP Size:", "tp_size"), ("DP Size:", "dp_size"), ("EP Size:", "ep_size"),
        ("Max Runtime Batch Size:", "max_batch_size"), ("Max Runtime Tokens:", "max_num_tokens"),
    ):  # fmt: skip
        lines.append(f"{label:<32}{world[key]}")
    lines += ["", _RULE, "= REQUEST DETAILS", _RULE]
    lines.append(f"{'Number of requests:':<32}{requests['num_requests']}")
    lines.append(f"{'Number of failed requests:':<32}{requests['num_failed_requests']}")
    for label, key in (
        ("Number of concurrent requests:", "avg_num_concurrent_requests"),
        ("Average Input Length (tokens):", "avg_input_length"),
        ("Average Output Length (tokens):", "avg_output_length"),
    ):
        lines.append(f"{label:<32}{requests[key]:.4f}")
    lines += ["", _RULE, "= PERFORMANCE OVERVIEW", _RULE]
    for label, key in (
        ("Request Throughput (req/sec):", "request_throughput_req_s"),
        ("Total Output Throughput (tokens/sec):", "system_output_throughput_tok_s"),
        ("Total Token Throughput (tokens/sec):", "system_total_throughput_tok_s"),
        ("Total Latency (ms):", "total_latency_ms"),
        ("Average request latency (ms):", "avg_request_latency_ms"),
        ("Per User Output Throughput [w/ ctx] (tps/user):", "output_throughput_per_user_tok_s"),
        ("Per Rank Output Throughput (tps/rank):", "output_throughput_per_gpu_tok_s"),
    ):
        lines.append(f"{label:<50}{speed[key]:.4f}")
    if streaming := found.get("streaming_metrics"):
        for label, key in (
            ("Average time-to-first-token [TTFT] (ms):", "avg_ttft_ms"),
            ("Average time-per-output-token [TPOT] (ms):", "avg_tpot_ms"),
            ("Per User Output Speed (tps/user):", "token_output_speed_tok_s"),
        ):
            lines.append(f"{label:<50}{streaming[key]:.4f}")
        for title, tag, key in (
            ("Time-per-Output-Token [TPOT] Breakdown (ms)", "TPOT", "tpot_percentiles"),
            ("Time-to-First-Token [TTFT] Breakdown (ms)", "TTFT", "ttft_percentiles"),
            ("Generation Throughput [GTPS] Breakdown (tps/user)", "GTPS", "gen_tps_percentiles"),
        ):
            lines += _breakdown(f"Per-Request {title}", tag, streaming[key])
    return lines + _breakdown("Request Latency Breakdown (ms)", "Latency", speed["request_latency_percentiles_ms"])


def _breakdown(title: str, tag: str, percentiles: dict[str, float]) -> list[str]:
    names = ("minimum", "maximum", "average", *(f"p{p}" for p in PERCENTS))
    return ["", f"-- {title}", "", *(f"[{tag}] {name.upper():<7}: {percentiles[name]:.4f}" for name in names)]
