"""A rank reads no more than is its own, also where all experts of a layer stand in one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpt_oss_models import yarn
from llama4_models import images, scout
from safetensors.torch import load_file, save_file
from small import prompts, reference

RANKS = 4
MAKERS = {"llama4": scout, "llama4-images": images, "gpt_oss": yarn}


def run_one_step(world, folder: str, prompt: list[int], expert_parallel: bool):
    """On each rank: load, run the prompt, hand back the logits, the bytes read, and its experts of the first layer."""
    from nonet.config import build_config
    from nonet.config.checkpoint import read_spec
    from nonet.config.resolve import resolve
    from nonet.engine.messages import StepBatch
    from nonet.engine.worker import Worker

    config = build_config(
        folder, dtype="float32", data_parallel_size=RANKS, enable_expert_parallel=expert_parallel, device="cpu",
        num_blocks=8,
    )  # fmt: skip
    spec = read_spec(folder)
    worker = Worker(resolve(config, spec, num_gpus=0), spec, world)
    step = StepBatch(prompt, [0], [len(prompt)], [list(range(8))], list(range(len(prompt))))
    logits = worker.run(step, [len(prompt)] * RANKS)
    own = len(worker.placement.experts_on(world.rank, 0))
    worker.close()
    return logits, worker.bytes_read, own, spec.num_experts


def without_what_sees(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the language model, in a file of their own; the file of the others is named, but not there."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(("vision", "multi_modal"))}
    if len(text) < len(tensors):
        save_file(text, folder / "text.safetensors", {"format": "pt"})
        where = {name: "text.safetensors" if name in text else "vision.safetensors" for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        single.unlink()
    return text


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_own_experts_bytes(name, cluster4, tmp_path):
    MAKERS[name](tmp_path)
    prompt = prompts(97, [30])[0]
    wanted = reference(tmp_path)(prompt)
    text = without_what_sees(tmp_path)
    fused = sum(tensor.nbytes for name, tensor in text.items() if ".experts." in name)
    common = sum(tensor.nbytes for tensor in text.values()) - fused
    assert fused > common / 2
    results = cluster4.run(run_one_step, str(tmp_path), prompt, True)
    for logits, bytes_read, own, experts in results:
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert bytes_read == common + fused // experts * own
    assert sum(own for _, _, own, _ in results) == results[0][3]


@pytest.mark.parametrize("name", ["llama4", "gpt_oss"])
def test_slices_of_all_experts_are_read_once_over_all_ranks(name, cluster4, tmp_path):
    """Expert parallelism off: 22 columns over 4 ranks, which does not divide."""
    MAKERS[name](tmp_path)
    prompt = prompts(97, [30])[0]
    text = without_what_sees(tmp_path)
    fused = sum(tensor.nbytes for name, tensor in text.items() if ".experts." in name)
    common = sum(tensor.nbytes for tensor in text.values()) - fused
    results = cluster4.run(run_one_step, str(tmp_path), prompt, False)
    for logits, *_ in results:
        torch.testing.assert_close(logits, reference(tmp_path)(prompt), atol=1e-4, rtol=1e-4)
    assert sum(bytes_read for _, bytes_read, _, _ in results) == RANKS * common + fused
