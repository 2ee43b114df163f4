"""Random Qwen3-MoE models saved by transformers, and transformers itself as the reference for their logits."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

# odd shapes on purpose: experts and vocabulary that do not divide, head_dim apart from hidden / heads
MODELS: dict[str, dict[str, object]] = {
    "odd22": dict(
        vocab_size=131, hidden_size=64, intermediate_size=90, moe_intermediate_size=46, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, num_experts=22, num_experts_per_tok=5,
        mlp_only_layers=[1], norm_topk_prob=True, tie_word_embeddings=True,
    ),
    "step2": dict(
        vocab_size=97, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2,
        decoder_sparse_step=2, norm_topk_prob=False, tie_word_embeddings=False, attention_bias=True,
    ),
    "top1": dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_experts=5, num_experts_per_tok=1,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
# shapes that kernels of GPUs were made for
FOR_GPUS: dict[str, dict[str, object]] = {
    "heads128": dict(
        vocab_size=131, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
}  # fmt: skip


@functools.cache
def folder(name: str) -> str:
    """The saved model; float32, made once a session."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(7)
    common: dict[str, object] = dict(max_position_embeddings=512, initializer_range=0.2, rope_theta=10000.0)
    config = Qwen3MoeConfig(**{**common, **(MODELS | FOR_GPUS)[name]}, eos_token_id=None, bos_token_id=None)
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():  # norms of ones and biases of zero would hide that they are not applied
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    path = Path(_scratch().name) / name
    model.save_pretrained(path)
    return str(path)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nonet-test-")


@functools.cache
def _model(path: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"  # the grouped one wants multiples of 16 bytes
    ).eval()


def reference(path: str):
    """Logits by transformers, in float32."""
    model = _model(path)

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0]

    return logits


def prompts(vocabulary: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
