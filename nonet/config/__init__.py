"""The configuration: one frozen tree, built once, printed, never edited again."""

from nonet.config.load import build_config, load_config
from nonet.config.schema import EngineConfig

__all__ = ["EngineConfig", "build_config", "load_config"]
