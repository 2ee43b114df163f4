"""The one place that reads environment variables. Each stands for a setting; a bad value is an error, not ignored."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from nonet.config.schema import EngineConfig
from nonet.errors import ConfigError


def _text(name: str, value: str) -> str:
    return value


def _flag(name: str, value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(name, value, "use 0 or 1")


# variable -> (leaf of the configuration, how to read it)
VARIABLES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": ("routing_simulation", _text),
    "VLLM_RANDOMIZE_DP_DUMMY_INPUTS": ("randomize_dp_dummy_inputs", _flag),
}


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Settings that the environment asks for, by leaf name. Raises ConfigError for a bad value."""
    return {
        leaf: read(variable, environ[variable])
        for variable, (leaf, read) in VARIABLES.items()
        if environ.get(variable)
    }


def omp_num_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS, if it is set. Raises ConfigError if it is no positive count."""
    value = environ.get("OMP_NUM_THREADS")
    if not value:
        return None
    if not value.isdigit() or int(value) < 1:
        raise ConfigError("OMP_NUM_THREADS", value, "use a positive count")
    return int(value)


def rank_environment(config: EngineConfig, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that ranks start with. What the user set for the allocator or the threads' waiting stays."""
    wanted = {
        # keep freed memory: a step allocates the same sizes again, and fresh pages cost more than the arithmetic
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        # large pages for the weights, where the system lends them
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # a thread that waits for another spins briefly, then sleeps: the cores are shared with the front end
        "GOMP_SPINCOUNT": "20000",
    }
    kept = {name: value for name, value in wanted.items() if name not in environ}
    return {**kept, "OMP_NUM_THREADS": str(config.runtime.threads_per_rank)}
