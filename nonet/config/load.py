"""Builds the configuration tree from flat keywords, dotted overrides, YAML and the environment.

Precedence: keyword > YAML > environment > default. Used by LLM and the command line; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from nonet.config import env
from nonet.config.schema import EngineConfig, Section
from nonet.errors import ConfigError, nearest

S = TypeVar("S", bound=Section)


def leaves() -> dict[str, str]:
    """Setting -> its dotted name, such as block_size -> cache.block_size."""
    return {name: dotted for name, dotted, is_section in _walk(EngineConfig) if not is_section}


def sections() -> dict[str, str]:
    """Group of settings -> its dotted name, such as load_balancer -> moe.load_balancer."""
    return {name: dotted for name, dotted, is_section in _walk(EngineConfig) if is_section}


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """(name, dotted name, whether it is a section) of all that stands below a section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield name, prefix + name, True
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield name, prefix + name, False


def build_config(model: str | None = None, /, **settings: Any) -> EngineConfig:
    """A configuration from flat (`block_size=16`) or dotted (`**{"cache.block_size": 16}`) settings.

    Raises ConfigError for an unknown name (naming the nearest) or a bad value.
    """
    if model is not None:
        settings["model"] = model
    return validate(EngineConfig, _merge(env.settings(), settings))


def load_config(path: str | Path, /, **settings: Any) -> EngineConfig:
    """A configuration from a YAML file (sections or flat names) with overrides on top.

    Raises ConfigError for a missing or malformed file, an unknown name, or a bad value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), "must hold a mapping of settings")
    return validate(EngineConfig, _merge(env.settings(), tree, settings))


def _merge(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Place every setting at its path; later sources win, setting by setting."""
    tree: dict[str, Any] = {}
    for source in sources:
        placed: dict[str, Any] = {}
        for name, value in _flatten(source):
            dotted = _dotted(name, value)
            if dotted in placed:
                raise ConfigError(name, value, f"is given twice, also with {placed[dotted]!r}; give it once")
            placed[dotted] = value
        for dotted, value in placed.items():
            *path, leaf = dotted.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = value
    return tree


def _flatten(source: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting; sections given as mappings become dotted names, empty ones nothing."""
    known = sections()
    for key, value in source.items():
        name = f"{prefix}{key}"
        section = known.get(name.rpartition(".")[2])
        if section is None or name not in (section, section.rpartition(".")[2]):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{section}.")
        elif value is not None or name == "model":  # the one name that is a section and a setting
            yield name, value


def _dotted(name: str, value: object) -> str:
    """The full name of a setting given by its flat or its full name. Raises ConfigError."""
    known, last = leaves(), name.rpartition(".")[2]
    section = sections().get(last)
    if section and last not in known and name in (last, section):
        raise ConfigError(name, value, "is a group of settings; give a mapping")
    dotted = known.get(last)
    if dotted is None:
        raise ConfigError(name, value, f"unknown setting; {nearest(last, known)}")
    if name not in (last, dotted):
        raise ConfigError(name, value, f"unknown setting; did you mean {dotted!r}?")
    return dotted


def validate(section: type[S], tree: Mapping[str, Any]) -> S:
    """A section from a nested mapping of its settings. Raises ConfigError for the first value that is bad."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        remedy = first["msg"][0].lower() + first["msg"][1:]
        value = None if first["type"] == "missing" else first["input"]
        raise ConfigError(field, value, remedy) from error
