"""Latent attention: against transformers' modules, its two forms against each other, and what stays unseen."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Paged
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from nonet.layers.attention import Prefill
from nonet.layers.mla import LatentAttention, LatentShape
from nonet.layers.rope import Rope
from nonet.weights.loader import Checkpoint

CPU = torch.device("cpu")
HIDDEN, HEADS, LENGTH = 20, 4, 13
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
EXTENDED = {"factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **EXTENDED, "mscale": 0.7, "mscale_all_dim": 1.0}
CASES = {
    "V3": {"module": v3, "q_lora_rank": 9},
    "V3 with YaRN and biases": {"module": v3, "q_lora_rank": 9, "attention_bias": True, "rope": YARN},
    "V3 without a latent of queries, with biases": {"module": v3, "q_lora_rank": None, "attention_bias": True},
    "V3 that turns halves": {"module": v3, "q_lora_rank": 9, "rope_interleave": False},
    "V2": {"module": v2, "q_lora_rank": 7, "rope": YARN},
    "V2-Lite, values wider than keys": {"module": v2, "q_lora_rank": None, "v_head_dim": 15},
}


class Case:
    """Their module with random weights, and ours reading them from a file."""

    def __init__(self, folder, module=v3, rope=None, **more) -> None:
        self.module = module
        config, layer = {
            v2: (DeepseekV2Config, v2.DeepseekV2Attention),
            v3: (DeepseekV3Config, v3.DeepseekV3Attention),
        }[module]
        given = dict(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=10, v_head_dim=8,
            qk_nope_head_dim=6, qk_rope_head_dim=4, head_dim=4, max_position_embeddings=64,
            rope_parameters={"rope_theta": 500.0, **(rope or {"rope_type": "default"})},
        )  # fmt: skip
        self.config = config(**given | more)
        self.config._attn_implementation = "eager"
        self.theirs = layer(self.config, 0).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        save_file({f"x.{k}": v for k, v in self.theirs.state_dict().items()}, folder / "model.safetensors")
        self.files = Checkpoint(folder, torch.float32, CPU)
        self.rope = Rope(4, 500.0, 64, torch.float32, CPU, rope)
        self.x_TD = torch.randn(LENGTH, HIDDEN, generator=generator)

    def wanted(self) -> torch.Tensor:
        """One sequence at once, causal."""
        kind = "V2" if self.module is v2 else "V3"
        rotary = getattr(self.module, f"Deepseek{kind}RotaryEmbedding")(self.config)
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        with torch.no_grad():
            cos_sin = rotary(self.x_TD[None], torch.arange(LENGTH)[None])
            return self.theirs(hidden_states=self.x_TD[None], position_embeddings=cos_sin, attention_mask=mask)[0][0]

    def layer(self, rank: int = 0, tp: int = 1, files: Checkpoint | None = None) -> LatentAttention:
        own, cfg = HEADS // tp, self.config
        shape = LatentShape(
            hidden=HIDDEN, q_lora_rank=cfg.q_lora_rank, kv_lora_rank=cfg.kv_lora_rank, nope=cfg.qk_nope_head_dim,
            rope=cfg.qk_rope_head_dim, value=cfg.v_head_dim, scale=self.theirs.scaling,
            interleaved=getattr(cfg, "rope_interleave", True),
        )  # fmt: skip
        return LatentAttention(files or self.files, "x", heads=(rank * own, (rank + 1) * own), shape=shape)


class Run:
    """A layer with a cache of its own."""

    def __init__(self, case: Case, layer: LatentAttention, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.layer, self.paged = case, layer, Paged(num_blocks=40, block_size=4)
        width = layer.shape.kv_lora_rank + layer.shape.rope
        self.cache = (torch.full((self.paged.places, 1, width), torch.nan, dtype=dtype),)

    def step(self, spans) -> torch.Tensor:
        """Spans of (blocks, first position, tokens), of the case's one sequence."""
        position = torch.cat([torch.arange(start, start + count) for _, start, count in spans])
        cos_sin = tuple(part.to(self.cache[0].dtype) for part in self.case.rope.at(position))
        x_TD = self.case.x_TD[position].to(self.cache[0].dtype)
        return self.layer.forward(x_TD, cos_sin, self.cache, self.paged.attention(spans))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_in_chunks_and_decoding_is_theirs(tmp_path, name, tp):
    """The sum over ranks. Both forms take part: chunks choose by cost, decoding is absorbed."""
    case = Case(tmp_path, **CASES[name])
    total = torch.zeros(LENGTH, HIDDEN)
    for rank in range(tp):
        run = Run(case, case.layer(rank, tp))
        blocks = run.paged.take(LENGTH)
        spans = [(0, 5), (5, 4), *((position, 1) for position in range(9, LENGTH))]
        total += torch.cat([run.step([(blocks, start, count)]) for start, count in spans])
    torch.testing.assert_close(total, case.wanted(), **CLOSE)


def test_several_sequences_in_one_step(tmp_path):
    """All are the same one, at different places: decoding of several lengths, and chunks with and without context."""
    case = Case(tmp_path, **CASES["V3 with YaRN and biases"])
    run, wanted = Run(case, case.layer()), case.wanted()
    blocks = [run.paged.take(LENGTH) for _ in range(4)]
    for own, count in zip(blocks, (2, 12, 6), strict=False):
        run.step([(own, 0, count)])
    got = run.step([(blocks[0], 2, 1), (blocks[1], 12, 1), (blocks[2], 6, 7), (blocks[3], 0, 13)])
    rows = [2, 12, *range(6, 13), *range(13)]
    torch.testing.assert_close(got, wanted[rows], **CLOSE)


@pytest.mark.parametrize("most", [1, 13 * 18 * 3, 1 << 27])  # one head at a time, three, all
@pytest.mark.parametrize("count", [2, 6, LENGTH])
@pytest.mark.parametrize("name", ["V3", "V2-Lite, values wider than keys"])
def test_the_forms_agree(tmp_path, name, count, most, monkeypatch):
    monkeypatch.setattr("nonet.layers.mla.MOST_MADE", most)
    case = Case(tmp_path, **CASES[name])
    run = Run(case, case.layer())
    blocks = run.paged.take(LENGTH)
    run.step([(blocks, 0, LENGTH)])
    q_THx = torch.randn(count, HEADS, 10, generator=torch.Generator().manual_seed(1))
    part = Prefill(0, count, run.paged.positions(blocks, LENGTH))
    plain = run.layer.plain(q_THx, run.cache, part)
    torch.testing.assert_close(run.layer.absorbed_chunk(q_THx, run.cache, part), plain, **CLOSE)
    decoding = run.paged.attention([(blocks, LENGTH - 1, 1)])
    torch.testing.assert_close(run.layer.absorbed(q_THx[-1:], run.cache, decoding), plain[-1:], **CLOSE)
    assert not torch.allclose(plain[:1], plain[-1:], atol=1e-3)


def test_the_reference_of_decoding_is_what_the_kernel_does(tmp_path, monkeypatch):
    """Where there is no compiled kernel, plain PyTorch decodes; padding of its batch may hold no numbers."""
    case = Case(tmp_path, **CASES["V3"])
    run = Run(case, case.layer())
    blocks = [run.paged.take(LENGTH) for _ in range(2)]
    for own, count in zip(blocks, (12, 2), strict=True):
        run.step([(own, 0, count)])
    monkeypatch.setattr("nonet.kernels.cpu.handles", lambda x: False)
    torch.testing.assert_close(run.step([(blocks[0], 12, 1), (blocks[1], 2, 1)]), case.wanted()[[12, 2]], **CLOSE)


@pytest.mark.parametrize(
    ("count", "context", "plain"),
    [(2, 2, True), (4096, 4096, True), (256, 8192, True), (16, 8192, False), (2, 100, False), (512, 100_000, True)],
)
def test_the_cheaper_form_is_chosen(tmp_path, count, context, plain):
    """By the widths of DeepSeek-V3."""
    layer = Case(tmp_path).layer()
    layer.shape = LatentShape(7168, 1536, 512, 128, 64, 128, 1.0, True)
    part = Prefill(0, count, torch.arange(context))
    assert layer._plain_is_cheaper(part) is plain


def test_what_is_in_other_places_of_the_cache_is_not_seen(tmp_path):
    case = Case(tmp_path)
    run = Run(case, case.layer())  # all of its cache is no number at first
    blocks = [run.paged.take(LENGTH) for _ in range(3)]
    spans = [(blocks[0], 12, 1), (blocks[1], 5, 1), (blocks[2], 7, 3)]
    for own, count in zip(blocks, (12, 5, 7), strict=True):
        run.step([(own, 0, count)])
    got = run.step(spans)
    assert torch.isfinite(got).all()
    used = torch.cat([run.paged.positions(own, start + count) for own, start, count in spans])
    other = torch.ones(run.paged.places, dtype=torch.bool)
    other[used] = False
    assert torch.isnan(run.cache[0][other]).all()
    run.cache[0][other] = 1e30
    assert torch.equal(run.step(spans), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(tmp_path, dtype):
    case = Case(tmp_path, **CASES["V3 with YaRN and biases"])
    run = Run(case, case.layer(files=Checkpoint(tmp_path, dtype, CPU)), dtype)
    blocks = run.paged.take(LENGTH)
    got = torch.cat([run.step([(blocks, 0, 6)]), run.step([(blocks, 6, 6)]), run.step([(blocks, 12, 1)])])
    wanted = case.wanted()
    assert got.dtype == dtype
    assert (got - wanted).norm() / wanted.norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3)
