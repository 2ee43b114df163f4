"""The `nonet` command: parses arguments, runs a command, and turns what goes wrong into one line and an exit code.

Commands import the rest of nonet when they run, so `nonet --help` is quick. Knows no tensors.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer

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


@_cli.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a shipped model's name.")] = "nonet-tiny",
    ranks: Annotated[int, typer.Option(min=1, help="Data-parallel ranks that share the experts.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 48,
    backend: Annotated[str, typer.Option(help="All-to-all that moves tokens to their experts.")] = "shm",
) -> None:
    """Start expert-parallel ranks on this host's CPUs, answer prompts of every kind, show where the tokens went."""
    from nonet.cli.demo import run

    run(model=model, ranks=ranks, max_tokens=max_tokens, backend=backend)


@_cli.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a shipped model's name.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be repeated.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that may be drawn.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the random draws.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of `nonet config`; repeatable.")
    ] = None,
) -> None:
    """Continue one or more prompts and print each with its continuation."""
    from nonet.config import build_config
    from nonet.engine.llm import LLM
    from nonet.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not all(prompt):
        raise RequestError("prompt", "", "must not be empty")
    with LLM(build_config(model, **parse_settings(settings or []))) as llm:
        for output in llm.generate(prompt, params):
            typer.echo(f"{output.prompt}{output.outputs[0].text}")


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, so numbers, true and lists come out as such."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError("--set", pair, "use name=value, as in --set data_parallel_size=4")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(name, value, f"is not YAML: {' '.join(str(error).split())}") from error
    return settings


@_cli.command()
def config() -> None:
    """Print every setting with its help text and default, as YAML that `load_config` reads."""
    from nonet.cli.settings import render

    typer.echo(render(width=int(os.environ.get("COLUMNS") or 100)), nl=False)
