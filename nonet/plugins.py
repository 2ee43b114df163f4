"""Finds implementations by file name: the name in the config is the name of the file.

Used by config validation and by whoever builds a backend. Listing a folder imports nothing, so a missing
optional dependency hurts only the one who asks for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from nonet.errors import ConfigError, nearest


def names(package: str) -> tuple[str, ...]:
    """The implementations in a package such as "nonet.moe.all2all", sorted, found without importing them."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")))


def check(package: str, name: str, field: str) -> None:
    """Raise ConfigError naming `field` unless `name` is an implementation in `package` or a dotted module."""
    if "." not in name and name not in names(package):
        raise ConfigError(field, name, nearest(name, names(package)))


def load(package: str, name: str, field: str) -> ModuleType:
    """Import `package.name`, or `name` itself if it is dotted (code outside nonet).

    Raises ConfigError naming `field` if there is no such implementation or it cannot run here
    (its `unavailable()` gives the reason).
    """
    check(package, name, field)
    try:
        module = importlib.import_module(name if "." in name else f"{package}.{name}")
    except ImportError as error:
        raise ConfigError(field, name, f"cannot be imported: {error}") from error
    reason = getattr(module, "unavailable", lambda: None)()
    if reason:
        raise ConfigError(field, name, f"not available here: {reason}")
    return module
