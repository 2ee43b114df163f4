"""The whole engine on a checkpoint in FP8: the tokens of what it stands for, ranks that read only what is theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import MODELS, folder, prompts, reference
from safetensors.torch import load_file, save_file

from nonet import LLM, SamplingParams
from nonet.kernels.fp8 import dequantize
from nonet.testing.equality import check_equality
from nonet.weights.loader import SCALE
from nonet.weights.quantize import quantize_folder

NAME, BLOCK = "odd22", 16  # hidden 64, experts of width 46: their last blocks are not full
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
REPLICAS = {"enable_expert_parallel": True, "num_redundant_experts": 4}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "fp8"
    quantize_folder(folder(NAME), path, block=BLOCK, shard_bytes=200_000)
    return path


@pytest.fixture(scope="module")
def plain(fp8) -> str:
    """What the numbers in FP8 stand for, in float32: what transformers is given."""
    tensors = {name: t for path in fp8.glob("*.safetensors") for name, t in load_file(path).items()}
    out = {name: t for name, t in tensors.items() if name + SCALE not in tensors and not name.endswith(SCALE)}
    for name, t in tensors.items():
        if name + SCALE in tensors:
            out[name] = dequantize(t, tensors[name + SCALE], BLOCK, torch.float32)
    path = fp8.parent / "plain"
    path.mkdir()
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def sizes(path: Path) -> tuple[int, dict[int, int]]:
    """(bytes of all that is not an expert's, bytes of each expert over all layers, all of one size)."""
    others, of_expert = 0, {}
    for file in path.glob("*.safetensors"):
        for name, t in load_file(file).items():
            before, expert, after = name.partition(".experts.")
            if expert:
                number = int(after.split(".")[0])
                of_expert[number] = of_expert.get(number, 0) + t.nbytes
            else:
                others += t.nbytes
    return others, of_expert


def equal(llm: LLM, plain: str) -> None:
    outs = llm.generate(prompts(int(MODELS[NAME]["vocab_size"]), [5, 30, 11, 2]), GREEDY)
    check_equality(reference(plain), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])


@pytest.mark.parametrize(
    ("tp", "dp", "settings"),
    [
        pytest.param(1, 2, REPLICAS, id="dp2-replicas"),
        pytest.param(2, 1, {}, id="tp2-sliced"),  # slices of 23, which begin inside a block
        pytest.param(1, 1, {"combine": "exact"}, id="exact"),
    ],
)
def test_tokens_are_those_of_the_dequantized_model(fp8, plain, tp, dp, settings):
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
        equal(llm, plain)
