"""`nonet bench`: reads the arguments, runs one benchmark, prints and writes its result.

The engine's flags (ours, vLLM's, TensorRT-LLM's) are whatever a benchmark's own options leave over.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import typer

from nonet.bench import arguments as args
from nonet.bench.options import LatencyOptions, Options, ServeOptions, ThroughputOptions
from nonet.config import EngineConfig
from nonet.errors import ConfigError, nearest

ABOUT = {
    "throughput": "Many requests at once through the engine in this process.",
    "latency": "One batch of requests after the other through the engine in this process.",
    "serve": "Load for any OpenAI-compatible server, and what it felt like: TTFT, TPOT, ITL, goodput.",
}
TRTLLM_FORM = "nonet bench --model NAME [--model_path DIR] throughput --dataset FILE [options] [engine flags]"
ENGINE_FLAGS = "All flags of the engine are accepted too, as in nonet serve: --model first of all (see nonet config)."

_NO_PROFILE = "there is no profiler; use py-spy or nsys around the command"
_NO_LORA = "there are no LoRA adapters"
_NO_BEAMS = "there is no beam search"
REFUSED = {
    "throughput": {
        "disable_detokenize": "text is always made", "profile": _NO_PROFILE, "lora_path": _NO_LORA,
        "hf_max_batch_size": "there is no backend hf", "dataset": "give --dataset-name and --dataset-path",
    },
    "latency": {"disable_detokenize": "text is always made", "profile": _NO_PROFILE, "use_beam_search": _NO_BEAMS},
    "serve": {
        "use_beam_search": _NO_BEAMS, "profile": _NO_PROFILE, "lora_modules": _NO_LORA, "lora_assignment": _NO_LORA,
        "plot_timeline": "there are no plots", "plot_dataset_stats": "there are no plots",
        "probe_request_rate": "there are no probes; run a second nonet bench serve beside",
        "dataset": "give --dataset-name and --dataset-path",
    },
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Everything after `nonet bench`; the exit code. Raises NonetError: for a mistake one line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        typer.echo(_overview(), nl=False)
        return 0
    if arguments[0].startswith("-"):
        return _trtllm(arguments)
    command, rest = arguments[0], arguments[1:]
    if command not in ABOUT:
        raise ConfigError("bench", command, f"no such benchmark; {nearest(command, ABOUT)}")
    if "-h" in rest or "--help" in rest:
        typer.echo(_help(command), nl=False)
        return 0
    return {"throughput": _throughput, "latency": _latency, "serve": _serve}[command](rest)


def engine_config(arguments: Sequence[str], options: type[Options]) -> EngineConfig:
    """The configuration that engine flags ask for, not resolved; its notes are printed. Raises ConfigError."""
    from nonet.config.dialects import read_arguments

    given = read_arguments(arguments, known=tuple(args.flag_of(options, name) for name in options.model_fields))
    for note in given.notes:
        typer.echo(f"note: {note}", err=True)
    return given.config


def _seed(options: ThroughputOptions | LatencyOptions) -> list[str]:
    """The seed is the engine's too, if it is given."""
    return ["--seed", str(options.seed)] if "seed" in options.model_fields_set else []


# ---------------------------------------------------------------- each benchmark


def _throughput(arguments: Sequence[str]) -> int:
    from nonet.bench import report, throughput

    options, rest = args.read(ThroughputOptions, arguments, refused=REFUSED["throughput"])
    report.check_writable("--output-json", options.output_json)
    config = engine_config([*rest, *_seed(options)], ThroughputOptions)
    run = throughput.run(options, config)
    _print(report.throughput_lines(run))
    if options.output_json:
        report.write_json("--output-json", options.output_json, run.result)
    return _verdict(run.num_requests, run.failed, run.first_error)


def _latency(arguments: Sequence[str]) -> int:
    from nonet.bench import latency, report

    options, rest = args.read(LatencyOptions, arguments, refused=REFUSED["latency"])
    report.check_writable("--output-json", options.output_json)
    config = engine_config([*rest, *_seed(options)], LatencyOptions)
    run = latency.run(options, config)
    _print(report.latency_lines(run))
    if options.output_json:
        report.write_json("--output-json", options.output_json, run.result)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    from nonet.bench import metrics, report, serve

    options, rest = args.read(ServeOptions, arguments, refused=REFUSED["serve"])
    if rest:
        known = [args.flag_of(ServeOptions, name) for name in ServeOptions.model_fields]
        word = rest[0].partition("=")[0]
        raise ConfigError(word, None, f"no option of bench serve; {nearest(word.replace('_', '-'), known)}")
    keep = options.save_result or options.append_result
    if keep:
        folder = options.result_dir or Path()
        report.check_writable("--result-dir", folder / (options.result_filename or "result.json"))
    run = asyncio.run(serve.run(options, os.environ.get("OPENAI_API_KEY")))
    for note in run.notes:
        typer.echo(f"warning: {note}", err=True)
    _print(report.serve_lines(run.result, options, metrics.metrics_from(options.percentile_metrics)))
    if keep:
        path = serve.result_path(options, run.result)
        data = serve.saved(run.result, options.save_detailed)
        report.write_json("--result-filename", path, data, append=options.append_result)
        typer.echo(f"Result written to {path}")
    return _verdict(run.result["completed"], run.result["failed"], run.first_error)


def _trtllm(arguments: Sequence[str]) -> int:
    """TensorRT-LLM's form: options of the model, then the benchmark's name, then its options."""
    from nonet.bench import report, trtllm

    if "-h" in arguments or "--help" in arguments:
        typer.echo(args.help_text(trtllm.TrtllmOptions, TRTLLM_FORM, ENGINE_FLAGS), nl=False)
        return 0
    words = list(arguments)
    place = next((i for i, word in enumerate(words) if _is_command(words, i)), None)
    if place is None:
        raise ConfigError("bench", " ".join(words[:2]), f"names no benchmark; use {TRTLLM_FORM}")
    if words[place] != "throughput":
        raise ConfigError("bench", words[place], "with --model before it there is only throughput")
    del words[place]
    options, rest = args.read(trtllm.TrtllmOptions, words, refused=trtllm.REFUSED)
    report.check_writable("--report_json", options.report_json)
    config = engine_config(trtllm.engine_arguments(rest), trtllm.TrtllmOptions)
    found, outcomes = trtllm.run(options, config)
    _print(trtllm.table(found))
    if options.report_json:
        report.write_json("--report_json", options.report_json, found)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    return _verdict(len(outcomes) - len(errors), len(errors), errors[0] if errors else None)


def _is_command(words: Sequence[str], i: int) -> bool:
    """Whether a word stands where a benchmark's name does: it is no flag and no flag's value."""
    return not words[i].startswith("-") and (i == 0 or not words[i - 1].startswith("--") or "=" in words[i - 1])


# ---------------------------------------------------------------- what is said


def _verdict(done: int, failed: int, first_error: str | None) -> int:
    """The exit code, 1 if no request succeeded; and the first error if there was one."""
    if failed:
        typer.echo(f"error: {failed} of {done + failed} requests failed; the first: {first_error}", err=True)
    return 1 if failed and not done else 0


def _print(lines: Sequence[str]) -> None:
    typer.echo("\n".join(lines))


def _overview() -> str:
    lines = ["Usage: nonet bench COMMAND [options]", "", "Measures the engine, or any OpenAI-compatible server."]
    lines += ["", "Commands:", *(f"  {name:<12}{about}" for name, about in ABOUT.items())]
    lines += ["", "nonet bench COMMAND --help lists a command's options. TensorRT-LLM's form is known too:"]
    return "\n".join([*lines, f"  {TRTLLM_FORM}"]) + "\n"


def _help(command: str) -> str:
    kinds: dict[str, type[Options]] = {
        "throughput": ThroughputOptions, "latency": LatencyOptions, "serve": ServeOptions,
    }  # fmt: skip
    flags = "" if command == "serve" else " [engine flags]"
    about = ABOUT[command] + (" The key in OPENAI_API_KEY is sent." if command == "serve" else f" {ENGINE_FLAGS}")
    return args.help_text(kinds[command], f"nonet bench {command} [options]{flags}", about)
