"""Mixtral: with a sliding window that prompts outgrow, and with plain attention."""

from __future__ import annotations

from pathlib import Path

from small import SMALL, save
from transformers import MixtralConfig, MixtralForCausalLM


def window(folder: Path) -> None:
    more = dict(intermediate_size=26, num_local_experts=7, num_experts_per_tok=3, sliding_window=11)
    save(lambda: MixtralForCausalLM(MixtralConfig(**{**SMALL, **more})), folder)


def plain(folder: Path) -> None:
    more = dict(
        intermediate_size=40, num_local_experts=8, num_experts_per_tok=2, sliding_window=None, num_key_value_heads=1,
        head_dim=10, tie_word_embeddings=True,
    )  # fmt: skip
    save(lambda: MixtralForCausalLM(MixtralConfig(**{**SMALL, **more})), folder)


MODELS = {"window": window, "plain": plain}
