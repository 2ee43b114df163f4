"""Commands that take, beside options of their own, every flag of the configuration and every word of the dialects.

`EngineCommand` takes those out before the parser sees the rest; `said(ctx)` hands them to the command. The help of the
flags is made from the schema and the table of words. Used by `main`; starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from nonet.config.dialects import Said

_SAID = "nonet.said"


class EngineCommand(TyperCommand):
    """A command with engine flags. Their help is listed where `lists_flags` is set."""

    lists_flags = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the engine's flags out; the rest is for the command's own options. Raises ConfigError."""
        from nonet.config.dialects import split_arguments

        own = {
            option: not getattr(param, "is_flag", False)
            for param in self.get_params(ctx)
            for option in (*param.opts, *param.secondary_opts)
            if option.startswith("-")
        }
        if not set(args) & set(ctx.help_option_names):  # help is wanted whatever else is there
            ctx.meta[_SAID], args = split_arguments(args, own)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        if self.lists_flags:
            for title, rows in (*_our_flags(), *_their_words()):
                with formatter.section(title):
                    formatter.write_dl(rows)


class ServeCommand(EngineCommand):
    lists_flags = True


class RawCommand(TyperCommand):
    """A command that reads all of its arguments itself, `--help` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


def said(ctx: typer.Context, model: str | None) -> list[Said]:
    """What was said in flags of the engine, and the model."""
    flags: list[Said] = ctx.meta.get(_SAID, [])
    return flags if model is None else [Said("model", model, "MODEL"), *flags]


def _our_flags() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, (flag, help) rows) of each section of the configuration."""
    from nonet.config.schema import EngineConfig, Section

    def walk(section: type[Section], title: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        rows, below = [], []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                below.append((field.annotation, field.description or ""))
            else:
                default = "" if field.is_required() or field.default is None else f" [default: {_plain(field.default)}]"
                rows.append((_usage(name, field.annotation), f"{field.description}{default}"))
        if rows:
            yield title.rstrip("."), rows
        for inner, text in below:
            yield from walk(inner, text)

    yield from walk(EngineConfig, "")


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _usage(name: str, annotation: Any) -> str:
    """A flag with what follows it."""
    from nonet.config.dialects.words import SHORT, flag, settings

    path = name if name in settings() else next(way for way in settings() if way.endswith(f".{name}"))
    short = next((f"{short}, " for short, word in SHORT.items() if word == path), "")
    kinds = [k for k in (get_args(annotation) or (annotation,)) if k is not type(None)]
    if kinds == [bool]:
        return f"{short}--[no-]{flag(path)[2:]}"
    if get_origin(annotation) is Literal:
        return f"{short}{flag(path)} {'|'.join(get_args(annotation))}"
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    if get_origin(kinds[0]) is list:
        return f"{short}{flag(path)} TEXT ..."
    return f"{short}{flag(path)} {names.get(kinds[0], 'JSON')}"


def _their_words() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, (flag, meaning) rows) of the words of each dialect, and of the files that hold words."""
    from nonet.config.dialects.words import FILES, WORDS, describe, flag

    yield "Files of settings", [(f"{flag(name)} FILE", WORDS[name].help) for name in FILES]
    for dialect in ("vLLM", "TensorRT-LLM"):
        rows = [(flag(word.name), describe(word)) for word in WORDS.values() if word.of == dialect]
        yield f"Words of {dialect}, as flags or as keys of a file", [row for row in rows if row[0] != flag(FILES[1])]
