"""Random small models saved by transformers, and transformers itself as the reference for their logits.

Family modules (`<family>_models.py`) save with it, `test_families` compares with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, object] = dict(
    vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=3,
    max_position_embeddings=256, initializer_range=0.2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
)  # fmt: skip


def save(build: Callable[[], PreTrainedModel], folder: Path, seed: int = 7) -> None:
    """Into `folder`, in float32. What starts as ones or zeros becomes random: it would hide that it is not applied."""
    torch.manual_seed(seed)
    model = build().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


@functools.cache
def _model(folder: str) -> torch.nn.Module:
    eager = "eager"  # of the experts: the grouped product wants multiples of 16 bytes
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=eager).eval()


def reference(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    """Logits [len, vocabulary] by transformers, in float32."""
    model = _model(str(folder))

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0]

    return logits


def prompts(vocabulary: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
