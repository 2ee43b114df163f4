"""nonet serves large Mixture-of-Experts language models with wide expert parallelism."""

from nonet.config import EngineConfig, build_config, load_config
from nonet.engine.llm import LLM, AsyncLLM
from nonet.errors import (
    CapacityError,
    CommError,
    CommTimeout,
    ConfigError,
    EngineDeadError,
    ModelError,
    NonetError,
    RequestError,
)
from nonet.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CommError",
    "CommTimeout",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "Logprob",
    "ModelError",
    "NonetError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "build_config",
    "load_config",
]
