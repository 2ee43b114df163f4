"""The one place that reads environment variables. Each stands for a setting; a bad value is an error, not ignored."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import get_args

from nonet.config.schema import ATTENTION_BACKENDS, EngineConfig, ModelConfig, iteration_range
from nonet.errors import ConfigError


def _text(name: str, value: str) -> str:
    return value


def _flag(name: str, value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(name, value, "use 0 or 1")


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(name, value, "use a positive count")
    return int(value)


def _range(name: str, value: str) -> str:
    iteration_range(name, value)
    return value


def _attention(name: str, value: str) -> str:
    own = get_args(ModelConfig.model_fields["attention_backend"].annotation)
    if value not in own and value.upper() not in ATTENTION_BACKENDS:
        raise ConfigError(name, value, f"use one of: {', '.join((*own, *ATTENTION_BACKENDS))}")
    return value


# variable -> (leaf of the configuration, how to read it)
VARIABLES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "VLLM_ATTENTION_BACKEND": ("attention_backend", _attention),
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": ("routing_simulation", _text),
    "VLLM_RANDOMIZE_DP_DUMMY_INPUTS": ("randomize_dp_dummy_inputs", _flag),
    "VLLM_MOE_DP_CHUNK_SIZE": ("dp_chunk_size", _count),
    "EXPERT_STATISTIC_ITER_RANGE": ("expert_statistic_iter_range", _range),
    "EXPERT_STATISTIC_PATH": ("expert_statistic_path", _text),
}

# variable -> what it asks for and is not built
MISSING: dict[str, str] = {}

# variable -> why it may be set and stands for no setting
HARMLESS = {
    "GLOO_SOCKET_IFNAME": "Read by PyTorch's gloo in the ranks; an interface that is not there is refused.",
    "TRTLLM_EPLB_SHM_NAME": "Shared memory has no names here, so several servers on a host need none.",
}


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Settings that the environment asks for, by leaf name. Raises ConfigError for a bad value or a missing feature."""
    for variable, feature in MISSING.items():
        if environ.get(variable):
            raise ConfigError(variable, environ[variable], f"{feature} is not built yet; unset it")
    return {
        leaf: read(variable, environ[variable]) for variable, (leaf, read) in VARIABLES.items() if environ.get(variable)
    }


def variable_of(leaf: str) -> str:
    """The variable that stands for a setting."""
    return next(variable for variable, (name, _) in VARIABLES.items() if name == leaf)


def omp_num_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS, if it is set. Raises ConfigError if it is no positive count."""
    value = environ.get("OMP_NUM_THREADS")
    if not value:
        return None
    return _count("OMP_NUM_THREADS", value)


def check_network(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if gloo is told to use a network interface that is not there."""
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise ConfigError("GLOO_SOCKET_IFNAME", name, f"no such network interface; here are: {', '.join(there)}")


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
