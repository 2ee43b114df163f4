"""Takes the words out of YAML files: TensorRT-LLM's keys, vLLM's flag names, or our own sections.

Used by `meaning`, and by `arguments` for mappings written as JSON. Knows no meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nonet.config.dialects.words import FILES, TRTLLM, WORDS, Said, Word, groups, lookup, settings
from nonet.errors import ConfigError

BALANCER = "moe_config.load_balancer"


def read_file(path: str, flag: str) -> list[Said]:
    """All that a file says. Raises ConfigError: it cannot be read, is not YAML, or has a key that is unknown."""
    tree = _load(path, flag)
    name = Path(path).name
    said = list(flatten(tree, lambda key: f"{name}: {key}"))
    for i, one in enumerate(said):
        if one.word == BALANCER and one.value is not None:
            said[i : i + 1] = balancer_file(one, Path(path).parent)
    if flag == "--extra_llm_api_options" or any(_is_trtllm(one.word) for one in said):
        said = [Said("max_num_batched_tokens", s.value, s.origin) if s.word == "max_num_tokens" else s for s in said]
    return said


def balancer_file(said: Said, beside: Path) -> list[Said]:
    """What the file says that `load_balancer` names: a path from here, or from the folder of the file that names it."""
    if not isinstance(said.value, str):
        raise ConfigError(said.origin, said.value, "give a file, or a mapping with num_slots")
    path = said.value
    if not Path(path).exists() and (beside / path).exists():
        path = str(beside / path)
    tree = _load(path, said.origin)
    return list(flatten({BALANCER: tree}, lambda key: f"{Path(path).name}: {key.removeprefix(BALANCER + '.')}"))


def flatten(tree: Mapping[Any, Any], origin: Callable[[str], str], prefix: str = "") -> Iterator[Said]:
    """Every word of a nested mapping with its value; empty groups say nothing. Raises ConfigError for unknown keys."""
    for key, value in tree.items():
        path = f"{prefix}{key}" if prefix else str(key).replace("-", "_")
        found = lookup(path)
        if path in groups() and (isinstance(value, Mapping) or (value is None and found is None)):
            yield from flatten(value or {}, origin, f"{path}.")
        elif found is None and path in groups():
            raise ConfigError(origin(path), value, "is a group of settings; give a mapping")
        elif path in FILES:
            raise ConfigError(origin(path), value, "names a file in a file; give it on the command line")
        elif found is None:
            raise ConfigError(origin(path), value, _unknown(path))
        else:
            yield Said(path, value, origin(path))


def _load(path: str, flag: str) -> Mapping[Any, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(flag, path, f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(flag, path, f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(flag, path, "must hold a mapping of settings")
    return tree


def _is_trtllm(path: str) -> bool:
    found = lookup(path)
    return isinstance(found, Word) and found.of == TRTLLM and path != "max_num_tokens"


def _unknown(path: str) -> str:
    """The end of the refusal of an unknown key: the nearest one in its group, else anywhere."""
    group, dot, key = path.rpartition(".")
    everything = [*settings(), *WORDS, *groups()]
    beside = [name.removeprefix(group + dot) for name in everything if name.rpartition(".")[0] == group]
    close = difflib.get_close_matches(key, beside, 1, 0.6) or difflib.get_close_matches(key, everything, 1, 0.6)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    if not group:
        return "unknown key; `nonet config` lists all settings, `nonet serve --help` all other words"
    return f"unknown key; in {group}: {', '.join(sorted({*beside}))}"
