"""Norm, rope, attention and dense MLP against transformers' Qwen3-MoE modules, whole and split over ranks."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Paged
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

from nonet.config.fleet import split_evenly
from nonet.kernels.linear import Weight, linear, pack
from nonet.layers.attention import Attention
from nonet.layers.embedding import Vocabulary
from nonet.layers.mlp import DenseMlp, span_of
from nonet.layers.norm import rms_norm_reference
from nonet.layers.rope import Rope, rotate
from nonet.weights.loader import Checkpoint

CPU = torch.device("cpu")
HIDDEN, LENGTH = 20, 11
SHAPES = [(4, 4, 8), (4, 2, 6), (6, 1, 4), (8, 4, 2)]  # heads, KV heads, head_dim; hidden / heads differs on purpose
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def config(heads: int = 4, kv_heads: int = 2, head_dim: int = 6, **more) -> Qwen3MoeConfig:
    made = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=17, rms_norm_eps=1e-3, max_position_embeddings=64, rope_theta=500.0, **more,
    )  # fmt: skip
    made._attn_implementation = "eager"
    return made


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, also the biases that start as zeros and the norms that start as ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def checkpoint(module: torch.nn.Module, folder, prefix: str = "x") -> Checkpoint:
    save_file({f"{prefix}.{k}": v.contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")
    return Checkpoint(folder, torch.float32, CPU)


def their_attention(cfg: Qwen3MoeConfig, module: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """One sequence at once, causal."""
    T = len(x_TD)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    position = torch.arange(T)[None]
    cos_sin = theirs.Qwen3MoeRotaryEmbedding(cfg)(x_TD[None], position)
    with torch.no_grad():
        return module(x_TD[None], cos_sin, mask)[0][0]


class Ours:
    """Our attention with a cache of its own, for one rank's heads."""

    def __init__(self, cfg: Qwen3MoeConfig, files: Checkpoint, rank: int = 0, tp: int = 1, block_size: int = 4) -> None:
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        own, own_kv = heads // tp, max(1, kv_heads // tp)
        first_kv = rank * kv_heads // tp
        self.layer = Attention(
            files, "x", heads=(rank * own, (rank + 1) * own), kv_heads=(first_kv, first_kv + own_kv),
            head_dim=cfg.head_dim, norm_eps=cfg.rms_norm_eps,
        )  # fmt: skip
        self.paged = Paged(num_blocks=40, block_size=block_size)
        self.rope = Rope(cfg.head_dim, 500.0, 64, torch.float32, CPU)
        self.cache = tuple(torch.zeros(self.paged.places, own_kv, cfg.head_dim) for _ in range(2))

    def run(self, x_TD: torch.Tensor, spans) -> torch.Tensor:
        batch = self.paged.batch(spans)
        return self.layer.forward(x_TD, self.rope.at(batch.position_T), self.cache, batch.attention)


def case(tmp_path, shape=(4, 2, 6), length: int = LENGTH, **more):
    """(config, the module's checkpoint, inputs, transformers' outputs)"""
    cfg = config(*shape, **more)
    module = randomised(theirs.Qwen3MoeAttention(cfg, 0))
    x_TD = torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(1))
    return cfg, checkpoint(module, tmp_path), x_TD, their_attention(cfg, module, x_TD)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_prompt(tmp_path, shape):
    cfg, files, x_TD, wanted = case(tmp_path, shape)
    ours = Ours(cfg, files)
    torch.testing.assert_close(ours.run(x_TD, [(ours.paged.take(LENGTH), 0, LENGTH)]), wanted, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", [[11], [4, 4, 3], [1] * 11, [5, 1, 1, 4], [10, 1], [1, 10], [3, 2, 6]], ids=str)
def test_a_prompt_in_chunks_is_the_prompt_at_once(tmp_path, shape, chunks):
    """Chunks of one token take the decoding path, the others the prompts'."""
    cfg, files, x_TD, wanted = case(tmp_path, shape)
    ours = Ours(cfg, files)
    blocks, start, out = ours.paged.take(LENGTH), 0, []
    for count in chunks:
        out.append(ours.run(x_TD[start : start + count], [(blocks, start, count)]))
        start += count
    torch.testing.assert_close(torch.cat(out), wanted, **CLOSE)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_sequences_beside_each_other_do_not_mix(tmp_path, block_size):
    """One decodes its last token while two other prompts come in, one of them behind a first chunk."""
    cfg, files, x_TD, wanted = case(tmp_path)
    module = randomised(theirs.Qwen3MoeAttention(cfg, 0))
    other = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(2))
    wanted_other = their_attention(cfg, module, other)
    ours = Ours(cfg, files, block_size=block_size)
    a, b, c = (ours.paged.take(n) for n in (LENGTH, 6, LENGTH))
    ours.run(torch.cat([x_TD[:-1], x_TD[:4]]), [(a, 0, LENGTH - 1), (c, 0, 4)])
    got = ours.run(torch.cat([x_TD[-1:], other, x_TD[4:]]), [(a, LENGTH - 1, 1), (b, 0, 6), (c, 4, LENGTH - 4)])
    torch.testing.assert_close(got, torch.cat([wanted[-1:], wanted_other, wanted[4:]]), **CLOSE)


@pytest.mark.parametrize(
    ("shape", "tp"), [((4, 4, 8), 2), ((4, 4, 8), 4), ((4, 2, 6), 4), ((6, 1, 4), 3), ((8, 4, 2), 2)]
)
def test_the_parts_of_the_ranks_add_up(tmp_path, shape, tp):
    """Also with fewer KV heads than ranks, where neighbours hold the same one."""
    cfg, files, x_TD, wanted = case(tmp_path, shape)
    total = torch.zeros_like(wanted)
    for rank in range(tp):
        ours = Ours(cfg, files, rank, tp)
        total += ours.run(x_TD, [(ours.paged.take(LENGTH), 0, LENGTH)])
    torch.testing.assert_close(total, wanted, **CLOSE)


@pytest.mark.parametrize("tp", [1, 2])
def test_biases_of_all_four_projections(tmp_path, tp):
    cfg, files, x_TD, wanted = case(tmp_path, attention_bias=True)
    total = torch.zeros_like(wanted)
    for rank in range(tp):
        ours = Ours(cfg, files, rank, tp)
        total += ours.run(x_TD, [(ours.paged.take(LENGTH), 0, LENGTH)])
    torch.testing.assert_close(total, wanted, **CLOSE)


def test_rms_norm_is_theirs():
    for dtype in (torch.float32, torch.bfloat16):
        module = randomised(theirs.Qwen3MoeRMSNorm(HIDDEN, eps=1e-3)).to(dtype)
        x = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype) * 5
        assert torch.equal(rms_norm_reference(x, module.weight.detach(), 1e-3), module(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_theirs(dtype):
    cfg = config(head_dim=8)
    position = torch.tensor([0, 1, 5, 63, 5])
    q, k = (torch.randn(5, n, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (4, 2))
    cos, sin = theirs.Qwen3MoeRotaryEmbedding(cfg)(q, position[None])
    wanted = theirs.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    mine = Rope(8, 500.0, 64, dtype, CPU).at(position)
    for x, y in zip((q, k), wanted, strict=True):
        assert torch.equal(rotate(x, *mine), y[0].transpose(0, 1))


class OneOf:
    """Stands in for a tensor-parallel group whose ranks run one after the other: gathers and sums are left out."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_gather_rows(self, x, rows):
        return Now(x)

    def reduce_scatter_rows(self, x, rows):
        return Now(x)


class Now:
    def __init__(self, value) -> None:
        self.value = value

    def wait(self):
        return self.value


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
def test_the_dense_mlp_is_theirs_in_any_number_of_parts(tmp_path, tp):
    """Its width of 17 divides over none of them."""
    module = randomised(theirs.Qwen3MoeMLP(config()))
    files = checkpoint(module, tmp_path)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    parts = [DenseMlp(files, "x", 17, OneOf(rank, tp)).forward(x, (4,)) for rank in range(tp)]
    assert [span_of(17, tp, rank)[1] - span_of(17, tp, rank)[0] for rank in range(tp)] == list(split_evenly(17, tp))
    torch.testing.assert_close(sum(parts), module(x).detach(), **CLOSE)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_the_vocabulary_in_parts_is_the_whole(tmp_path, tp):
    """Each rank embeds its own tokens and leaves zeros for the others', and has the logits of its own rows."""
    table = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1))
    save_file({"x": table}, tmp_path / "model.safetensors")
    files, token = Checkpoint(tmp_path, torch.float32, CPU), torch.tensor([0, 9, 4, 4, 3, 7])
    ranks = [Vocabulary(files, "x", 10, OneOf(rank, tp)).as_head() for rank in range(tp)]
    assert torch.equal(sum(rank.embed(token, (6,)) for rank in ranks), table[token])
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    got = torch.cat([rank.logits(x) for rank in ranks], dim=1)
    torch.testing.assert_close(got, x @ table.t(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_linear_packed_or_not(dtype, rows, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 12, generator=generator).to(dtype), torch.randn(7, 12, generator=generator).to(dtype)
    b = torch.randn(7, generator=generator).to(dtype) if bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    got = linear(x, pack(weight), b)
    torch.testing.assert_close(linear(x, Weight(weight, None), b).double(), wanted, atol=5e-2, rtol=5e-2)
    assert (got.shape, got.dtype) == ((rows, 7), dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)
