"""Whole engines on checkpoints in FP8: the tokens of what they stand for, and ranks that read only what is theirs."""

from __future__ import annotations

import json
from pathlib import Path

import deepseek_v3_models
import mixtral_models
import pytest
import qwen3_moe_models
import torch
from safetensors.torch import load_file, save_file
from small import SMALL, prompts, reference

from nonet import LLM, SamplingParams
from nonet.kernels.fp8 import dequantize
from nonet.testing.equality import check_equality
from nonet.weights.loader import SCALE
from nonet.weights.quantize import quantize_folder

BLOCK = 16  # that divides no expert's width
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
LENGTHS = [5, 30, 11, 2]


def dequantized(fp8: Path, folder: Path) -> Path:
    """What the numbers in FP8 stand for, in float32: what transformers is given."""
    tensors = {name: t for path in fp8.glob("*.safetensors") for name, t in load_file(path).items()}
    out = {name: t for name, t in tensors.items() if name + SCALE not in tensors and not name.endswith(SCALE)}
    for name, t in tensors.items():
        if name + SCALE in tensors:
            out[name] = dequantize(t, tensors[name + SCALE], BLOCK, torch.float32)
    folder.mkdir()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sizes(path: Path) -> tuple[int, dict[int, int]]:
    """(bytes of all that is not an expert's, bytes of each expert over all layers)."""
    others, of_expert = 0, {}
    for file in path.glob("*.safetensors"):
        for name, t in load_file(file).items():
            _, expert, after = name.partition(".experts.")
            if expert:
                number = int(after.split(".")[0])
                of_expert[number] = of_expert.get(number, 0) + t.nbytes
            else:
                others += t.nbytes
    return others, of_expert


@pytest.mark.parametrize(
    ("maker", "tp", "dp", "settings"),
    [
        pytest.param(
            qwen3_moe_models.yarn,
            1,
            2,
            {"enable_expert_parallel": True, "num_redundant_experts": 5},
            id="qwen3-replicas",
        ),
        pytest.param(deepseek_v3_models.v3, 2, 1, {}, id="deepseek-sliced"),  # slices of 7, inside a block
        pytest.param(mixtral_models.plain, 1, 1, {"combine": "exact"}, id="mixtral-exact"),
    ],
)
def test_tokens_are_those_of_the_dequantized_model(tmp_path, maker, tp, dp, settings):
    (tmp_path / "source").mkdir()
    maker(tmp_path / "source")
    fp8 = tmp_path / "fp8"
    done = quantize_folder(str(tmp_path / "source"), fp8, block=BLOCK, shard_bytes=100_000)
    assert done.files > 1
    logits = reference(dequantized(fp8, tmp_path / "plain"))
    ranks = {"tensor_parallel_size": tp, "data_parallel_size": dp}
    with LLM(
        str(fp8), **ranks, block_size=8, num_blocks=48, max_num_batched_tokens=24, max_num_seqs=8, **settings
    ) as llm:
        others, of_expert = sizes(fp8)
        read = [ready.bytes_read for ready in llm.client.ready]
        if tp == 1:  # each rank has its slots, replicas included, and all the rest
            assert len(set(of_expert.values())) == 1
            slots = (len(of_expert) + settings.get("num_redundant_experts", 0)) // dp
            assert read == [others + slots * of_expert[0]] * dp
        else:
            assert max(read) < 0.75 * (others + sum(of_expert.values()))
        outs = llm.generate(prompts(int(str(SMALL["vocab_size"])), LENGTHS), GREEDY)
        check_equality(logits, [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])
