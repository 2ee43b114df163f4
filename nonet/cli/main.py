"""The `nonet` command: parses arguments, runs a command, and turns what goes wrong into one line and an exit code.

Commands import the rest of nonet when they run, so `nonet --help` is quick. Knows no tensors.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from nonet.cli import eplb
from nonet.cli.flags import EngineCommand, RawCommand, ServeCommand, said
from nonet.config.dialects import Said
from nonet.errors import ConfigError, NonetError, RequestError

_INTERRUPTED = 130

_cli = typer.Typer(
    name="nonet",
    help="Serves large Mixture-of-Experts language models with wide expert parallelism.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def app(arguments: list[str] | None = None) -> None:
    """The entry point: always leaves by SystemExit. Errors of ours are one line on standard error, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {_flat(message)}", err=True)
            code = _cli(args=arguments or sys.argv[1:] or ["--help"], prog_name="nonet", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_INTERRUPTED)
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        typer.echo(f"error: {line}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(code if isinstance(code, int) else 0)


def _flat(text: object) -> str:
    """On one line."""
    return " ".join(str(text).split())


def _one_line(error: Exception) -> str | None:
    """What to tell the user; None if the error is a defect of ours, which keeps its traceback."""
    if isinstance(error, NonetError):
        text = str(error)
    elif hasattr(error, "format_message"):  # the argument parser's errors
        text = error.format_message()
    else:
        return None
    return _flat(text)


def _version(wanted: bool) -> None:
    if wanted:
        from nonet import __version__

        typer.echo(__version__)
        raise typer.Exit


@_cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@_cli.command(cls=ServeCommand)
def serve(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder of a checkpoint, or a shipped model's name.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what would run and where values come from; start nothing.")
    ] = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's routes.

    Takes vLLM's flags and, as --config FILE, TensorRT-LLM's YAML; every setting is a flag.
    """
    from nonet.cli.serve import run

    raise typer.Exit(run(said(ctx, model), print_config=print_config))


@_cli.command(cls=EngineCommand, short_help="Continue prompts and print them.")
def generate(
    ctx: typer.Context,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be repeated.")],
    model: Annotated[str | None, typer.Argument(help="Folder of a checkpoint, or a shipped model's name.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that may be drawn.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the random draws.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of `nonet config`; repeatable.")
    ] = None,
) -> None:
    """Continue one or more prompts and print each with its continuation.

    Takes the flags that `nonet serve --help` lists.
    """
    from nonet.config.dialects import read_said
    from nonet.engine.llm import LLM
    from nonet.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not all(prompt):
        raise RequestError("prompt", "", "must not be empty")
    given = read_said([*said(ctx, model), *parse_settings(settings or [])])
    for note in given.notes:
        typer.echo(f"note: {note}", err=True)
    with LLM(given.config) as llm:
        for output in llm.generate(prompt, params):
            typer.echo(f"{output.prompt}{output.outputs[0].text}")


@_cli.command(cls=RawCommand, short_help="Measure throughput, latency or a running server.")
def bench(ctx: typer.Context) -> None:
    """Measure throughput, latency or a running server. `nonet bench --help` says how."""
    from nonet.cli.bench import main

    raise typer.Exit(main(ctx.args))


_cli.add_typer(eplb.app, short_help="Balance experts: report, plan, simulate, advise.")


@_cli.command(short_help="Show expert-parallel ranks at work on this host's CPUs.")
def demo(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a shipped model's name.")] = "nonet-tiny",
    ranks: Annotated[int, typer.Option(min=1, help="Data-parallel ranks that share the experts.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 48,
    backend: Annotated[str, typer.Option(help="All-to-all that moves tokens to their experts.")] = "shm",
) -> None:
    """Start expert-parallel ranks on this host's CPUs, answer prompts of every kind, show where the tokens went."""
    from nonet.cli.demo import run

    run(model=model, ranks=ranks, max_tokens=max_tokens, backend=backend)


@_cli.command(short_help="Convert a checkpoint's experts and linear layers to FP8.")
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a shipped model's name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new or empty.")],
    max_shard_gib: Annotated[float, typer.Option(min=0.001, help="Most GiB in one of its files.")] = 4.0,
) -> None:
    """Write a checkpoint again with experts and linear layers in FP8, in blocks of 128 x 128, as DeepSeek-V3's are.

    Embeddings, norms, routers and the head keep their type; tokenizer and other files are copied.
    """
    from nonet.cli.quantize import run

    run(source, target, int(max_shard_gib * 2**30))


def parse_settings(pairs: list[str]) -> list[Said]:
    """`name=value` pairs; values are read as YAML, so numbers, true and lists come out as such. Raises ConfigError."""
    import yaml

    from nonet.config.dialects.files import flatten
    from nonet.config.load import leaves

    settings: list[Said] = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError("--set", pair, "use name=value, as in --set data_parallel_size=4")
        try:
            full = leaves().get(name, name)
            tree = {full: yaml.safe_load(value)}
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {name}", value, f"is not YAML: {' '.join(str(error).split())}") from error
        settings += flatten(tree, lambda key, name=name, full=full: f"--set {name if key == full else key}")  # type: ignore[misc]
    return settings


@_cli.command(short_help="List the model families, or say which one serves a checkpoint.")
def models(
    model: Annotated[str | None, typer.Argument(help="Folder of a checkpoint, or a shipped model's name.")] = None,
) -> None:
    """List the model families and what each does, or say which one serves a checkpoint, if any does."""
    from nonet.cli.models import listing, served

    lines = [served(model)] if model else listing(int(os.environ.get("COLUMNS") or 100))
    typer.echo("\n".join(lines))


@_cli.command(short_help="Print every setting with its help text and default.")
def config() -> None:
    """Print every setting with its help text and default, as YAML that `load_config` reads."""
    from nonet.cli.settings import render

    typer.echo(render(width=int(os.environ.get("COLUMNS") or 100)), nl=False)
