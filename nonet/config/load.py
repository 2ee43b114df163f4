"""Builds the configuration tree from flat keywords, dotted overrides, YAML and the environment.

Precedence: keyword > YAML > environment > default. Used by LLM and the command line; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nonet.config import env
from nonet.config.schema import EngineConfig, Section
from nonet.errors import ConfigError, nearest


def leaves() -> dict[str, tuple[str, ...]]:
    """Leaf name -> its path in the tree, such as block_size -> (cache, block_size)."""
    found: dict[str, tuple[str, ...]] = {}

    def walk(section: type[Section], path: tuple[str, ...]) -> None:
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                walk(kind, (*path, name))
                if path:
                    found[name] = (*path, name)
            else:
                assert name not in found, f"setting {name} stands twice"
                found[name] = (*path, name)

    walk(EngineConfig, ())
    return found


def build_config(model: str | None = None, /, **settings: Any) -> EngineConfig:
    """A configuration from flat (`block_size=16`) or dotted (`**{"cache.block_size": 16}`) settings.

    Raises ConfigError for an unknown name (naming the nearest) or a bad value.
    """
    if model is not None:
        settings["model"] = model
    return _validate(_merge(env.settings(), settings))


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
    return _validate(_merge(env.settings(), tree, settings))


def _merge(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Place every setting at its path; later sources win."""
    known = leaves()
    sections = set(EngineConfig.model_fields)
    tree: dict[str, Any] = {}
    for source in sources:
        for name, value in _flatten(source, sections).items():
            path = tuple(name.split(".")) if "." in name else known.get(name)
            if path is None or (path[-1] not in known and path[0] not in sections):
                raise ConfigError(name, value, f"unknown setting; {nearest(name, known)}")
            if path[-1] not in known:
                raise ConfigError(name, value, f"unknown setting; {nearest(path[-1], known)}")
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
    return tree


def _flatten(source: Mapping[str, Any], sections: set[str]) -> dict[str, Any]:
    """Sections given as mappings become dotted names."""
    flat: dict[str, Any] = {}
    for name, value in source.items():
        if name in sections and isinstance(value, Mapping):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def _validate(tree: dict[str, Any]) -> EngineConfig:
    try:
        return EngineConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            remedy = f"unknown setting; {nearest(str(first['loc'][-1]), leaves())}"
        else:
            remedy = first["msg"][0].lower() + first["msg"][1:]
        value = None if first["type"] == "missing" else first["input"]
        raise ConfigError(field, value, remedy) from error
