"""Takes the flags that are words of ours or of the dialects out of a command line, with their values.

`--flag value`, `--flag=value`, `--no-flag`, `--group '{"key": 1}'` and `--group.key 1` are read; "_" equals "-" up to
the first dot. Used by `meaning` and by commands that have options of their own beside. Knows no meaning.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence

from nonet.config.dialects.files import flatten
from nonet.config.dialects.words import SHORT, Said, flags, groups, kind_of
from nonet.errors import ConfigError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def split_arguments(
    arguments: Sequence[str], own: Mapping[str, bool] | None = None, *, near: Collection[str] = ()
) -> tuple[list[Said], list[str]]:
    """What was said in words of the table, and the rest in order: positional arguments and options in `own`.

    `own` are the options of the command itself and whether each takes a value; `near` are more flags that may have
    been meant. Raises ConfigError for an unknown flag, naming the nearest, for a missing value and for bad JSON.
    """
    own = own or {}
    near = (*own, *near)
    said: list[Said] = []
    rest: list[str] = []
    todo = list(arguments)
    while todo:
        token = todo.pop(0)
        name, equals, value = token.partition("=")
        if token == "--":
            rest += [token, *todo]
            break
        name = name if name in own else fold(name)
        if name in own:
            rest.append(name + equals + value)
            if own[name] and not equals and todo:
                rest.append(todo.pop(0))
        elif re.match(r"--?[A-Za-z]", token):
            said += _flag(token.partition("=")[0], value if equals else None, todo, near)
        else:
            rest.append(token)
    return said, rest


def fold(name: str) -> str:
    """A flag with "-" for "_" up to the first dot."""
    first, dot, keys = name.partition(".")
    return first.replace("_", "-") + dot + keys


def _flag(name: str, value: str | None, todo: list[str], near: Collection[str]) -> list[Said]:
    """One flag; takes its value off `todo`."""
    path = SHORT.get(name) or _path(name)
    negated = path.startswith("no_") and kind_of(path) is None and kind_of(path[3:]) == "switch"
    path = path[3:] if negated else path
    kind = kind_of(path)
    if kind is None or not name.startswith("--") and name not in SHORT:
        raise ConfigError(name, value if value is not None else _peek(todo), _unknown(name, near))
    if kind == "switch":
        return [Said(path, _switch(name, value, todo, negated), name)]
    if kind == "list":
        values = [value] if value is not None else []
        while value is None and _peek(todo) is not None:
            values.append(todo.pop(0))
        if not values:
            raise ConfigError(name, None, "needs at least one value")
        return [Said(path, values, name)]
    if value is None:
        if _peek(todo) is None:
            raise ConfigError(name, None, "needs a value")
        value = todo.pop(0)
    if kind == "mapping" or (path in groups() and value.startswith("{")):
        return _mapping(path, name, value)
    return [Said(path, value if kind == "text" else scalar(value), name)]


def _path(name: str) -> str:
    """The word of a flag."""
    first, dot, keys = name.lstrip("-").partition(".")
    return first.replace("-", "_") + dot + keys


def _peek(todo: Sequence[str]) -> str | None:
    """The next token if it is a value; one that begins like a flag is not."""
    return todo[0] if todo and not re.match(r"--?[A-Za-z]", todo[0]) else None


def _switch(name: str, value: str | None, todo: list[str], negated: bool) -> bool:
    if value is None and todo and todo[0].lower() in ("true", "false"):
        value = todo.pop(0)
    if value is not None and value.lower() not in TRUE + FALSE:
        raise ConfigError(name, value, "use true or false")
    return (value is None or value.lower() in TRUE) != negated


def _mapping(path: str, name: str, text: str) -> list[Said]:
    try:
        value = json.loads(text)
    except ValueError as error:
        example = '{"key": 1}'
        raise ConfigError(name, text, f"is not JSON ({error}); quote it for the shell, as in '{example}'") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(name, value, "use a JSON mapping")
    return list(flatten({path: value}, lambda key: name if key == path else f"{name}: {key.removeprefix(path + '.')}"))


def scalar(text: str) -> object:
    """Numbers, true, false and null as such; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unknown(name: str, near: Collection[str]) -> str:
    """The end of the refusal of an unknown flag: the nearest known one."""
    known = [known for known in (*flags(), *near) if known.startswith("--") == name.startswith("--")]
    close = difflib.get_close_matches(fold(name), known, n=1, cutoff=0.6)
    return f"unknown flag; did you mean {close[0]}?" if close else "unknown flag; --help lists all"
