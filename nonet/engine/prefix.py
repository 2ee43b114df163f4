"""The first items of a list that only grows: a snapshot without a copy, so that long streams do not cost their square.

Used by `output` for what a stream shows before it is finished. Knows nothing of requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class Prefix(Sequence[T]):
    """Reads like a list of the items that were there when it was made, and equals one; slices are lists."""

    __slots__ = ("_items", "_length")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, items: list[T]) -> None:
        self._items, self._length = items, len(items)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(self._length)[place]
        if isinstance(places, int):
            return self._items[places]
        if places.step == 1:
            return self._items[places.start : places.stop]
        return [self._items[i] for i in places]

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(self._items, self._length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Prefix):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self[:],)

    def __repr__(self) -> str:
        return repr(self[:])
