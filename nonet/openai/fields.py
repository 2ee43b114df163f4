"""What all request bodies share: strict types, and one line for whatever is wrong with a body.

Used by `requests`. A key nobody knows is refused with the nearest known one; a key that is known but whose feature is
not here takes only the values that ask for nothing.
"""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from nonet.errors import RequestError, nearest

_SHOWN = 80  # characters of a wrong value that an error repeats

BodyT = TypeVar("BodyT", bound="Body")


class Body(BaseModel):
    """A JSON object of a request. Types are not converted: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), arbitrary_types_allowed=True)


class Shown:
    """A value as an error repeats it: cut if it is long."""

    def __init__(self, value: object) -> None:
        text = repr(value if not isinstance(value, str | list | dict) else _front(value))
        self._text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

    def __repr__(self) -> str:
        return self._text

    __str__ = __repr__


def _front(value: str | list[Any] | dict[Any, Any]) -> object:
    """Enough of a long value to fill what is shown."""
    if isinstance(value, dict):
        return dict(list(value.items())[:_SHOWN])
    return value[: 2 * _SHOWN] if isinstance(value, str) else value[:_SHOWN]


def parse(kind: type[BodyT], data: object) -> BodyT:
    """The body, checked. Raises RequestError for the first thing that is wrong: field, value, remedy."""
    if not isinstance(data, dict):
        raise RequestError("body", Shown(data), "send a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first(kind, error) from None
    except OverflowError:
        raise RequestError("body", Shown(data), "holds a number that is too large") from None


def _first(kind: type[Body], error: ValidationError) -> RequestError:
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    place, value = first["loc"], Shown(first["input"])
    if first["type"] == "extra_forbidden":
        return RequestError(path(place), value, f"unknown field; {nearest(str(place[-1]), _known(kind, place))}")
    if first["type"] == "missing":
        return RequestError(path(place), None, "is required")
    return RequestError(path(place), value, first["msg"].replace("Input should", "must"))


def path(place: tuple[int | str, ...]) -> str:
    """`messages[0].content`"""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _known(kind: type[Body], place: tuple[int | str, ...]) -> list[str]:
    """The keys of the object that holds this place."""
    for step in place[:-1]:
        if isinstance(step, str) and step in kind.model_fields:
            inner = _body_in(kind.model_fields[step].annotation)
            if inner is not None:
                kind = inner
    return list(kind.model_fields)


def _body_in(annotation: Any) -> type[Body] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Body) else None
    return next((found for part in typing.get_args(annotation) if (found := _body_in(part))), None)


def refuse(why: str) -> PydanticCustomError:
    """What a validator raises: the remedy, in words."""
    return PydanticCustomError("refused", "{why}", {"why": why})


class Only:
    """Beside a field's type: it is known but takes only these values, or null."""

    def __init__(self, *values: Any, why: str) -> None:
        self.values, self.why = (None, *values), why

    def check(self, value: Any) -> Any:
        if not any(value == good and type(value) is type(good) for good in self.values):
            raise refuse(self.why)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": f"Only null or what is listed: {self.why}."}
