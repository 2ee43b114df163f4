"""A rank reads its own tensors only: each rank's folder lacks the files that hold the other ranks' experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from oracle import MODELS, folder, prompts, reference
from safetensors.torch import load_file, save_file

RANKS, NAME = 4, "odd22"


def split_by_rank(into: Path) -> None:
    """One folder a rank: the common file, the file of its own experts, and the index that names them all."""
    source = Path(folder(NAME))
    tensors = load_file(source / "model.safetensors")
    experts = int(MODELS[NAME]["num_experts"])
    bounds = [0, 6, 12, 17, 22]  # 22 experts over 4 ranks: the first two have one more
    files: dict[str, dict[str, torch.Tensor]] = {}
    where = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        file = "common.safetensors"
        if "experts" in parts:
            expert = int(parts[parts.index("experts") + 1])
            file = f"rank{next(r for r in range(RANKS) if expert < bounds[r + 1])}.safetensors"
        files.setdefault(file, {})[name] = tensor
        where[name] = file
    assert experts == bounds[-1]
    for rank in range(RANKS):
        own = into / str(rank)
        own.mkdir()
        shutil.copy(source / "config.json", own)
        (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        for file in ("common.safetensors", f"rank{rank}.safetensors"):
            save_file(files[file], own / file)


def run_one_step(world, root: str, prompt: list[int]):
    """On each rank: load from its own folder, run the prompt, hand back the logits and the bytes read."""
    from nonet.config import build_config
    from nonet.config.checkpoint import read_spec
    from nonet.config.resolve import resolve
    from nonet.engine.messages import StepBatch
    from nonet.engine.worker import Worker

    own = f"{root}/{world.rank}"
    config = build_config(
        own, dtype="float32", data_parallel_size=RANKS, enable_expert_parallel=True, device="cpu", num_blocks=8
    )
    spec = read_spec(own)
    worker = Worker(resolve(config, spec, num_gpus=0), spec, world)
    step = StepBatch(prompt, [0], [len(prompt)], [list(range(8))], list(range(len(prompt))))
    logits = worker.run(step, [len(prompt)] * RANKS)
    worker.close()
    return logits, worker.bytes_read


def test_ranks_start_without_the_other_ranks_files(cluster4, tmp_path):
    split_by_rank(tmp_path)
    prompt = prompts(int(MODELS[NAME]["vocab_size"]), [20])[0]
    results = cluster4.run(run_one_step, str(tmp_path), prompt)
    wanted = reference(folder(NAME))(prompt)
    whole = (Path(folder(NAME)) / "model.safetensors").stat().st_size
    for logits, bytes_read in results:
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert bytes_read < 0.75 * whole
