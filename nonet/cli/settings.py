"""Renders the configuration tree as YAML with help texts. Used by `nonet config`."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from nonet.config.schema import EngineConfig, Section


def render(section: type[Section] = EngineConfig, depth: int = 0, *, width: int = 100) -> str:
    """Every setting below its help text, with its default; valid YAML but for the model, which has none."""
    pad = "  " * depth
    lines: list[str] = []
    for name, field in section.model_fields.items():
        lines.extend(f"{pad}# {line}" for line in textwrap.wrap(_help(field), width - len(pad) - 2))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines.append(f"{pad}{name}:")
            lines.append(render(kind, depth + 1, width=width).rstrip("\n"))
        else:
            lines.append(f"{pad}{name}: {_default(field)}")
    return "\n".join(lines) + "\n"


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    values = _choices(field.annotation)
    return f"{text} One of: {', '.join(values)}." if values else text


def _choices(kind: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def _default(field: FieldInfo) -> str:
    """JSON, which is YAML."""
    return "# required" if field.is_required() else json.dumps(field.default)
