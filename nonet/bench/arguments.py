"""Between a command line and options: reads flags, converts values, writes the help text.

Used by `nonet bench`. `_` equals `-` in flags. What is no flag of the options is handed back in its order: it belongs
to the engine's configuration. Every mistake is a ConfigError that names the flag.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from nonet.bench.options import Options
from nonet.errors import ConfigError

Kind = TypeVar("Kind", bound=Options)
WIDTH = 110
_FLAG_WIDTH = 30


def read(
    kind: type[Kind], arguments: Sequence[str], *, refused: Mapping[str, str] | None = None
) -> tuple[Kind, list[str]]:
    """The options given, and the arguments that are none of them.

    `refused` are flags (without dashes, with `_`) known from elsewhere that cannot work here, and why.
    """
    given: dict[str, Any] = {}
    rest: list[str] = []
    spelled: dict[str, str] = {}
    todo = list(arguments)
    while todo:
        word = todo.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in (refused or {}):
            raise ConfigError(flag, value or None, f"is not supported: {(refused or {})[name]}")
        if name not in kind.model_fields:
            rest.append(word)
            continue
        if name in given:
            raise ConfigError(flag, value or None, "is given twice; give it once")
        spelled[name] = flag
        given[name] = _value(kind.model_fields[name], flag, value if equals else None, todo)
    return validated(kind, given, spelled), rest


def validated(kind: type[Kind], given: Mapping[str, Any], spelled: Mapping[str, str] | None = None) -> Kind:
    """Options from values by name. Raises ConfigError with the flag as the user wrote it."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag = (spelled or {}).get(name, flag_of(kind, name))
        message = first["msg"][0].lower() + first["msg"][1:]
        remedy = "is required" if first["type"] == "missing" else message
        raise ConfigError(flag, given.get(name), remedy) from error


def _value(field: FieldInfo, flag: str, attached: str | None, todo: list[str]) -> Any:
    """The value of a flag, taken from `flag=value` or from the words that follow."""
    if _is(field, bool):
        return True if attached is None else attached
    if _is(field, list):
        many = [] if attached is None else [attached]
        while todo and not todo[0].startswith("--"):
            many.append(todo.pop(0))
        if not many:
            raise ConfigError(flag, None, "needs one value or more")
        return many
    if attached is not None:
        return attached
    if not todo or todo[0].startswith("--"):
        raise ConfigError(flag, None, "needs a value")
    return todo.pop(0)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The type of a field, or the types that it may have, None aside."""
    kind = field.annotation
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(one for one in kinds if one is not type(None))


def _is(field: FieldInfo, kind: type) -> bool:
    return any(one is kind or get_origin(one) is kind for one in _kinds(field))


def flag_of(kind: type[Options], name: str) -> str:
    """As users of that program spell it: TensorRT-LLM writes `_`, vLLM `-`."""
    return f"--{name}" if getattr(kind, "underscores", False) else f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- help text


def help_text(kind: type[Options], usage: str, about: str) -> str:
    """All options below their groups' titles, with defaults."""
    lines = [f"Usage: {usage}", "", *textwrap.wrap(about, WIDTH)]
    for title, names in _groups(kind).items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _lines(kind, name)
    return "\n".join(lines) + "\n"


def _groups(kind: type[Options]) -> dict[str, list[str]]:
    """Title -> names, each field below the title of the first group that declares it."""
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    for part in reversed(kind.__mro__):
        if isinstance(part, type) and issubclass(part, Options):
            declared = part.__dict__.get("__annotations__", {})
            own = [name for name in part.model_fields if name in declared and name not in seen]
            seen.update(own)
            groups.setdefault(part.title, []).extend(own)
    return {title: names for title, names in groups.items() if names}


def _lines(kind: type[Options], name: str) -> list[str]:
    field = kind.model_fields[name]
    head = f"  {flag_of(kind, name)}{_metavar(name, field)}"
    text = (field.description or "") + _default(field)
    body = textwrap.wrap(text, WIDTH - _FLAG_WIDTH - 2)
    if len(head) > _FLAG_WIDTH:
        return [head, *(" " * (_FLAG_WIDTH + 2) + line for line in body)]
    return [f"{head:<{_FLAG_WIDTH + 2}}{body[0]}", *(" " * (_FLAG_WIDTH + 2) + line for line in body[1:])]


def _metavar(name: str, field: FieldInfo) -> str:
    kinds = _kinds(field)
    if bool in kinds:
        return ""
    for one in kinds:
        if get_origin(one) is Literal:
            return " " + "|".join(map(str, get_args(one)))
    if _is(field, list):
        return " WORD ..."
    if Path in kinds:
        return " DIR" if name.endswith("_dir") else " FILE"
    return {int: " N", float: " X", str: " WORD"}.get(kinds[0], " JSON")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " Required."
    return "" if field.default is None or field.default is False else f" [{field.default}]"
