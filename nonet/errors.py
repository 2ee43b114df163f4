"""Every error nonet raises, and what each means to a caller: the exit code of a command, the status of a reply.

    error                                                              exit  HTTP
    NonetError                                                            1   500
    |-- ConfigError        a setting is wrong: field, value, remedy       2   400
    |-- RequestError       a request is wrong: field, value, remedy       2   400
    |-- CapacityError      larger than a rank's whole KV cache            1   503
    |-- ModelError         a checkpoint is missing, broken or unknown     3   500
    |-- CommError          ranks could not talk to each other             4   503
    |   |-- CommTimeout    a bounded wait ended; names the missing ranks  4   503
    |-- EngineDeadError    a rank or the supervisor ended; names it       5   503

Used by every floor; knows none of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class NonetError(Exception):
    """Base of all errors that nonet raises on purpose."""

    exit_code = 1
    http_status = 500


class _FieldError(NonetError):
    """One line: which field, which value, what to do about it."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[_FieldError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.remedy)


class ConfigError(_FieldError):
    """A setting is wrong; start-up is refused."""

    exit_code = 2
    http_status = 400


class RequestError(_FieldError):
    """A request is wrong; the engine lives on."""

    exit_code = 2
    http_status = 400


class CapacityError(NonetError):
    """A rank refused a sequence that is larger than its whole KV cache; the message has both sizes.

    Front ends know the cache and raise RequestError before: this comes only from a rank that was asked all the same.
    Too little room for now is no error: sequences wait.
    """

    http_status = 503


class ModelError(NonetError):
    """A checkpoint is missing, broken, or of an unknown architecture."""

    exit_code = 3


class CommError(NonetError):
    """Ranks could not talk to each other."""

    exit_code = 4
    http_status = 503


class CommTimeout(CommError):
    """A bounded wait ended. `missing` are the global ranks that did not arrive (empty if unknown)."""

    def __init__(self, what: str, seconds: float, missing: Sequence[int] = ()) -> None:
        self.what, self.seconds, self.missing = what, seconds, tuple(missing)
        who = f"rank(s) {', '.join(map(str, missing))} did not arrive" if missing else "a rank did not arrive"
        super().__init__(f"{what}: {who} within {seconds:.0f} s")

    def __reduce__(self) -> tuple[type[CommTimeout], tuple[str, float, tuple[int, ...]]]:
        return type(self), (self.what, self.seconds, self.missing)


class EngineDeadError(NonetError):
    """The engine ended while requests were open; the message names the rank and how it ended."""

    exit_code = 5
    http_status = 503


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a remedy for an unknown name: the nearest known one, or all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(options)}"
