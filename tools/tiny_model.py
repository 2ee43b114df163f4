"""Training form of nonet-tiny: the Qwen3-MoE architecture written densely for one GPU.

Every expert is computed for every token and unselected experts are multiplied by zero, which is the
same function (and gradient) as sparse routing, costs little at this size, and runs as plain large
matrix products that are fast and repeatable. `export` writes the names Hugging Face loaders expect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TinyConfig:
    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 5
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    num_experts: int = 32
    top_k: int = 4
    expert_size: int = 64
    rope_theta: float = 10000.0
    max_positions: int = 2048
    eps: float = 1e-6
    dropout: float = 0.1

    def hf(self) -> dict[str, object]:
        """config.json as `Qwen3MoeForCausalLM` reads it, with old and new names of a few keys."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size * self.top_k, "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k, "moe_intermediate_size": self.expert_size,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "hidden_act": "silu", "rms_norm_eps": self.eps, "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.001, "output_router_logits": False, "initializer_range": 0.02,
            "sliding_window": None, "use_sliding_window": False, "use_cache": True,
            "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
            "torch_dtype": "bfloat16", "dtype": "bfloat16",
        }


def rope(cfg: TinyConfig, n: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    inv = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)
    ang = torch.outer(torch.arange(n, device=device).float(), inv)
    ang = torch.cat([ang, ang], -1)
    return ang.cos(), ang.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim, c.eps), Norm(c.head_dim, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.c.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.c.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        rep = self.c.num_heads // self.c.num_kv_heads
        k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Experts(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c = c
        self.router = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))
        self.gate = nn.Parameter(torch.empty(c.num_experts * c.expert_size, c.hidden_size))
        self.up = nn.Parameter(torch.empty(c.num_experts * c.expert_size, c.hidden_size))
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.num_experts * c.expert_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.router).softmax(-1)
            top, idx = probs.topk(c.top_k, -1)
            top = top / top.sum(-1, keepdim=True)
            weight = torch.zeros_like(probs).scatter(-1, idx, top)
            used = (weight > 0).float().mean((0, 1)) / c.top_k
            aux = c.num_experts * (used.detach() * probs.mean((0, 1))).sum()
        h = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        h = h.unflatten(-1, (c.num_experts, c.expert_size)) * weight.to(h.dtype).unsqueeze(-1)
        return F.linear(h.flatten(-2), self.down), aux


class Layer(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(c.hidden_size, c.eps), Norm(c.hidden_size, c.eps)
        self.attn, self.mlp = Attention(c), Experts(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.drop(self.attn(self.norm1(x), cos, sin))
        y, aux = self.mlp(self.norm2(x))
        return x + self.drop(y), aux


class TinyModel(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = Norm(c.hidden_size, c.eps)
        self.drop = nn.Dropout(c.dropout)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                out = name.endswith(("o_proj.weight", "down"))
                nn.init.normal_(p, std=0.02 if "embed" in name else
                                (c.hidden_size ** -0.5) * (0.3 if out else 0.8))

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position (nats) and the mean load-balance loss of the layers."""
        cos, sin = rope(self.c, ids.shape[1], ids.device)
        x = self.drop(self.embed(ids))
        aux = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, a = layer(x, cos, sin)
            aux = aux + a
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return loss.view_as(targets), aux / len(self.layers)

    def export(self) -> dict[str, Tensor]:
        """State as Hugging Face checkpoints of Qwen3-MoE name it, in bf16 on the CPU."""
        c = self.c
        out: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed.weight,
                                  "model.norm.weight": self.norm.weight}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            p = f"model.layers.{i}."
            out[p + "input_layernorm.weight"] = layer.norm1.weight
            out[p + "post_attention_layernorm.weight"] = layer.norm2.weight
            for name, w in layer.attn.named_parameters():
                out[f"{p}self_attn.{name}"] = w
            out[p + "mlp.gate.weight"] = layer.mlp.router
            for part, mat, dim in (("gate", layer.mlp.gate, 0), ("up", layer.mlp.up, 0),
                                   ("down", layer.mlp.down, 1)):
                for e, piece in enumerate(torch.split(mat, c.expert_size, dim)):
                    out[f"{p}mlp.experts.{e}.{part}_proj.weight"] = piece
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in out.items()}
