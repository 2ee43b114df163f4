"""DeepSeek's own ground: what a token takes in the cache, the variants of its router, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from deepseek_v3_models import LATENT, YARN, v2_lite, v3
from safetensors.torch import save_file
from small import SMALL, prompts, reference, save
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from nonet.config import build_config
from nonet.config.checkpoint import read_spec
from nonet.config.resolve import block_bytes, resolve
from nonet.errors import ModelError
from nonet.models import deepseek_v3
from nonet.models.base import family_of
from nonet.testing.cluster import run_ranks
from nonet.weights.loader import SCALE, Checkpoint
from nonet.weights.quantize import quantize_folder

BLOCK, BLOCKS = 8, 6
ROW = int(LATENT["kv_lora_rank"]) + int(LATENT["qk_rope_head_dim"])  # numbers that a layer caches of a token


def v2(folder: Path) -> None:
    """Group-limited softmax with a factor, queries by a latent."""
    more = dict(
        v_head_dim=10, q_lora_rank=14, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2, n_group=4,
        topk_group=2, topk_method="group_limited_greedy", first_k_dense_replace=1, routed_scaling_factor=3.0,
        rope_parameters={"rope_type": "yarn", **YARN},
    )  # fmt: skip
    save(lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**{**SMALL, **LATENT, **more})), folder)


def kimi_k2(folder: Path) -> None:
    """One group, all layers but the first with experts; the checkpoint names an architecture of its own."""
    more = dict(
        v_head_dim=16, q_lora_rank=14, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, n_shared_experts=1, routed_scaling_factor=2.8, norm_topk_prob=True,
        rope_parameters={"rope_type": "yarn", **YARN},
    )  # fmt: skip
    save(lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**SMALL, **LATENT, **more})), folder)


MAKERS = {"v3": v3, "v2_lite": v2_lite, "v2": v2, "kimi_k2": kimi_k2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in made.items():
        MAKERS[name](folder)
    return made


@pytest.fixture(scope="module")
def in_fp8(folders, tmp_path_factory) -> tuple[Path, Path]:
    """The first model in FP8, in blocks that no rank's heads end with, and what its numbers stand for in float32."""
    quantized, plain = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("plain")
    quantize_folder(str(folders["v3"]), quantized, block=7)
    files = Checkpoint(quantized, torch.float32, torch.device("cpu"))
    tensors = {name: files.read(name) for name in files.names() if not name.endswith(SCALE)}
    assert files.is_fp8("model.layers.0.self_attn.kv_b_proj.weight")
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    shutil.copy(folders["v3"] / "config.json", plain)
    return quantized, plain


def steps(world, folder: str, prompt: list[int]):
    """On each of two ranks of one tensor-parallel group: a prompt in two chunks and a token decoded."""
    from nonet.engine.messages import StepBatch
    from nonet.engine.worker import Worker

    config = build_config(
        folder, tensor_parallel_size=2, device="cpu", block_size=BLOCK, num_blocks=BLOCKS, enable_expert_parallel=True
    )
    spec = read_spec(folder)
    resolved = resolve(config, spec, num_gpus=0)
    worker = Worker(resolved, spec, world)
    logits, cut = [], [0, len(prompt) // 2, len(prompt) - 1, len(prompt)]
    for start, end in zip(cut, cut[1:], strict=False):
        step = StepBatch(prompt[start:end], [start], [end - start], [list(range(BLOCKS))], list(range(end - start)))
        logits.append(worker.run(step, [end - start]))
    shapes = [[tuple(part.shape) for part in layer] for layer in worker.cache]
    written = torch.cat([layer[0] for layer in worker.cache])
    size = sum(part.nbytes for layer in worker.cache for part in layer)
    worker.close()
    return torch.cat(logits), shapes, size, block_bytes(resolved, spec), written


def all_steps(world, folders: dict[str, str], prompt: list[int]):
    return {name: steps(world, folder, prompt) for name, folder in folders.items()}


def test_logits_are_theirs_and_the_cache_holds_one_row_a_token_and_layer(folders, in_fp8):
    """The same row on both ranks, whatever the number of heads."""
    [prompt] = prompts(int(SMALL["vocab_size"]), [41])
    served = {name: str(folder) for name, folder in folders.items()} | {"fp8": str(in_fp8[0])}
    first, second = run_ranks(2, all_steps, served, prompt, tensor_parallel_size=2)
    for name, folder in (folders | {"fp8": in_fp8[1]}).items():
        logits, shapes, size, block, written = first[name]
        torch.testing.assert_close(logits, reference(folder)(prompt), atol=1e-4, rtol=1e-4)
        places = (BLOCKS + 1) * BLOCK  # a scratch block behind the last
        assert shapes == second[name][1] == [[(places, 1, ROW)]] * 3
        assert block == 3 * BLOCK * ROW * 4  # bytes of float32
        assert size == (BLOCKS + 1) * block
        assert written[: len(prompt)].abs().sum(dim=(1, 2)).gt(0).all()
        torch.testing.assert_close(written, second[name][4])


@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK2ForCausalLM"])
def test_architectures_of_the_family(folders, tmp_path, architecture):
    keys = {"architectures": [architecture], "model_type": "kimi_k2", "norm_topk_prob": False}
    spec = changed(folders["kimi_k2"], tmp_path, keys)
    assert family_of(spec) is deepseek_v3


def changed(folder: Path, to: Path, keys: dict):
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | keys))
    return read_spec(str(to))


def told(spec) -> tuple:
    """What the rule of this config does, on fixed logits with a bias of its own."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(9, spec.num_experts, generator=generator)
    bias_E = torch.randn(spec.num_experts, generator=generator)
    expert_TK, weight_TK = deepseek_v3.routing_rule(spec, bias_E)(logits_TE)
    return expert_TK.tolist(), weight_TK.tolist()


def test_what_is_not_said_is_meant_as_the_architecture_has_it(folders, tmp_path):
    """The newer generation of config.json says neither how experts are scored nor how they are chosen."""
    silent = changed(folders["kimi_k2"], tmp_path, {})
    assert not {"scoring_func", "topk_method"} & set(silent.raw)
    aloud = changed(folders["kimi_k2"], tmp_path, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    softmax = changed(folders["kimi_k2"], tmp_path, {"scoring_func": "softmax"})
    assert told(silent) == told(aloud) != told(softmax)
    null = changed(folders["kimi_k2"], tmp_path, {"scoring_func": None, "routed_scaling_factor": None})
    plain = changed(folders["kimi_k2"], tmp_path, {"routed_scaling_factor": 2.5})
    assert told(null) == told(plain) != told(silent)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("v3", {"topk_method": "hashed"}, "topk_method = 'hashed' is not supported; supported: greedy, group_limited"),
        ("v3", {"scoring_func": "sqrt"}, "scoring_func = 'sqrt' is not supported; supported: softmax, sigmoid"),
        ("v3", {"n_group": 5}, "n_group = 5 is not supported; supported: divisors of 12"),
        ("v3", {"n_group": 12}, "n_group = 12 is not supported; supported: groups of 2 experts or more"),
        ("v3", {"topk_group": 5}, "topk_group = 5 is not supported; supported: 1 to 4"),
        ("v3", {"topk_group": 1}, "topk_group = 1 is not supported; supported: groups with 4 experts or more in all"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported; supported: false"),
        ("v2", {"mlp_bias": True}, "mlp_bias = True is not supported; supported: false"),
        ("v2", {"v_head_dim": None}, "v_head_dim = None is not supported; supported: a positive width"),
        ("v2", {"qk_rope_head_dim": 5}, "qk_rope_head_dim = 5 is not supported; supported: even widths"),
        ("v2", {"kv_lora_rank": 0}, "kv_lora_rank = 0 is not supported; supported: a positive width"),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_read(folders, tmp_path, name, keys, message):
    with pytest.raises(ModelError) as caught:
        family_of(changed(folders[name], tmp_path, keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- what released checkpoints say ------------------------------------------------------------------------------------

RELEASED_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168, "kv_lora_rank": 512,
    "intermediate_size": 18432, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
RELEASED_V2_LITE = RELEASED_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "rope_scaling": RELEASED_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
RELEASED_KIMI = RELEASED_V3 | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "n_routed_experts": 384, "topk_group": 1,
    "num_attention_heads": 64, "num_key_value_heads": 64, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "rope_scaling": RELEASED_V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0}, "num_nextn_predict_layers": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "moe_layers", "scale", "q_lora_rank"),
    [
        (RELEASED_V3, range(3, 61), 0.135234, 1536),
        (RELEASED_V2_LITE, range(1, 27), 0.114721, None),
        (RELEASED_KIMI, range(1, 61), 0.130861, 1536),
    ],
    ids=["V3", "V2-Lite", "Kimi-K2"],
)
def test_released_configurations(tmp_path, config, moe_layers, scale, q_lora_rank):
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(str(tmp_path))
    settled = resolve(build_config(str(tmp_path), device="cpu", tensor_parallel_size=4), spec, num_gpus=0)
    assert family_of(spec) is deepseek_v3
    assert spec.moe_layers == tuple(moe_layers)
    shape = deepseek_v3.latent_shape(spec)
    assert (shape.q_lora_rank, shape.kv_lora_rank, shape.rope, shape.interleaved) == (q_lora_rank, 512, 64, True)
    assert shape.scale == pytest.approx(scale, rel=1e-4)
    assert block_bytes(settled, spec) == spec.num_layers * settled.cache.block_size * 576 * 2
    expert_TK, weight_TK = deepseek_v3.routing_rule(spec, torch.zeros(spec.num_experts))(
        torch.randn(5, spec.num_experts)
    )
    assert expert_TK.shape == (5, config["num_experts_per_tok"])
    if config["norm_topk_prob"]:
        torch.testing.assert_close(weight_TK.sum(dim=1), torch.full((5,), config["routed_scaling_factor"]))
