"""What FP8 costs: bits per byte of nonet-tiny on the shipped held-out text, before and after `nonet quantize`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from nonet import LLM, SamplingParams
from nonet.config.checkpoint import SHIPPED
from nonet.weights.loader import Checkpoint
from nonet.weights.quantize import quantize_folder

WINDOW, STRIDE = 2048, 1024
SCORE = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)


def stream(kind: str) -> list[int]:
    """The documents of one kind (a line with a form feed divides them) with <|endoftext|> around each."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "nonet-tiny" / "tokenizer.json"))
    ids = [0]
    for text in (SHIPPED / "heldout" / f"{kind}.txt").read_text("utf-8").rstrip("\n").split("\n\f\n"):
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
    return ids


def text_bytes(kind: str, ids: list[int]) -> int:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "nonet-tiny" / "tokenizer.json"))
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def bits(llm: LLM, ids: list[int]) -> float:
    """Of all text tokens. Windows overlap, and each token counts in the first that holds it."""
    begins = range(0, max(1, len(ids) - 1 - (WINDOW - STRIDE)), STRIDE)
    outs = llm.generate([ids[begin : begin + WINDOW - 1] for begin in begins], SCORE)
    total, done = 0.0, 1
    for begin, out in zip(begins, outs, strict=True):
        own = list(zip(out.prompt_token_ids, out.prompt_logprobs, strict=True))[done - begin :]
        total -= sum(found[token].logprob for token, found in own if token != 0)
        done = begin + len(out.prompt_token_ids)
    assert done == len(ids), "every token is counted"
    return total / math.log(2)


def measure(folder: Path | str, texts: list[list[int]], **settings: object) -> list[float]:
    with LLM(str(folder), max_model_len=WINDOW, max_num_batched_tokens=2 * WINDOW, **settings) as llm:
        return [bits(llm, ids) for ids in texts]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "nonet-tiny-fp8"
    quantize_folder("nonet-tiny", folder)
    return folder


def test_a_piece_of_each_kind_costs_less_than_one_percent(quantized):
    """7 x 500 tokens, as one stream; the whole text is in the test below."""
    kinds = sorted(path.stem for path in (SHIPPED / "heldout").glob("*.txt"))
    texts = [stream(kind)[:500] for kind in kinds]
    before, after = (sum(measure(folder, texts)) for folder in ("nonet-tiny", quantized))
    print(
        f"{sum(map(len, texts))} tokens: {before:.1f} bits in bfloat16, {after:.1f} in FP8, {after / before - 1:+.3%}"
    )
    assert before != after, "else nothing was quantized"
    assert after < 1.01 * before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_held_out_text_costs_less_than_one_percent(quantized, dtype):
    kinds = sorted(path.stem for path in (SHIPPED / "heldout").glob("*.txt"))
    texts = [stream(kind) for kind in kinds]
    before, after = (measure(folder, texts, dtype=dtype) for folder in ("nonet-tiny", quantized))
    for kind, ids, was, now in zip(kinds, texts, before, after, strict=True):
        size = text_bytes(kind, ids)
        print(f"{kind}: {was / size:.4f} -> {now / size:.4f} bits per byte, {now / was - 1:+.3%}")
    print(f"all, {dtype}: {sum(after) / sum(before) - 1:+.4%}")
    assert sum(after) < 1.01 * sum(before)


def test_transformers_reads_the_same_numbers(quantized):
    """The format is the one others know: on CPUs it dequantizes to bfloat16 while loading."""
    from transformers import AutoModelForCausalLM

    layer = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16).model.layers[3]
    checkpoint = Checkpoint(quantized, torch.bfloat16, torch.device("cpu"))
    prefix = "model.layers.3"
    assert checkpoint.is_fp8(f"{prefix}.self_attn.o_proj.weight")
    assert torch.equal(layer.self_attn.o_proj.weight, checkpoint.read(f"{prefix}.self_attn.o_proj.weight"))
    assert torch.equal(layer.mlp.gate.weight, checkpoint.read(f"{prefix}.mlp.gate.weight"))
    for expert in (0, 31):
        gate, up, down = (
            checkpoint.read(f"{prefix}.mlp.experts.{expert}.{n}_proj.weight") for n in ("gate", "up", "down")
        )
        assert torch.equal(layer.mlp.experts.gate_up_proj[expert], torch.cat([gate, up]))
        assert torch.equal(layer.mlp.experts.down_proj[expert], down)
    checkpoint.close()
