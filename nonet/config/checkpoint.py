"""Reads a Hugging Face folder's config.json into what parallelism and caching need to know, old and new keys alike.

Read by `config.resolve`, the models and the scheduler. What is special to one family, its file under models/ reads
from `raw`. Knows no tensors.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nonet.errors import ConfigError, ModelError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ORIGINAL = "original_max_position_embeddings"
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}  # by rope_type
ROPE_TYPES = tuple(ROPE_NEEDS)
ROPE_MAY_HAVE = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
SHIPPED = Path(__file__).parent.parent / "assets"  # models that come with the package


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder model with a Mixture of Experts in some of its layers."""

    folder: Path
    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    moe_layers: tuple[int, ...]  # indices of the layers that hold experts
    rope_theta: float
    rms_norm_eps: float
    kv_lora_rank: int  # multi-head latent attention: what keys and values are compressed to; else 0
    qk_rope_head_dim: int  # and the rotated part beside it
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False)


def find_folder(model: str) -> Path:
    """The checkpoint's folder: a path, or the name of a model that is shipped. Raises ConfigError."""
    try:
        path = Path(model).expanduser()
        if (path / "config.json").is_file():
            return path
        shipped = SHIPPED / model
        if (shipped / "config.json").is_file():
            return shipped
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # no permission; a name no file can have; no such user
        raise ConfigError("model", model, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        raise ConfigError("model", model, "the folder has no config.json; give a checkpoint in Hugging Face form")
    names = sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))
    raise ConfigError("model", model, f"no such folder; give a checkpoint's folder or one of: {', '.join(names)}")


def read_spec(model: str) -> ModelSpec:
    """The shape of the model in a folder. Raises ConfigError (no folder) or ModelError (broken config.json)."""
    folder = find_folder(model)
    raw = read_json(folder / "config.json")
    try:
        return _spec(folder, _text_part(raw))
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: key {error.args[0]!r} is missing") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from error


def needs_code(folder: Path, trust_remote_code: bool) -> bool:
    """Whether a folder's tokenizer is Python code: no tokenizer.json, and a class that tokenizer_config.json names.

    Raises ConfigError if it is and such code is not trusted or transformers, which runs it, is not installed.
    """
    settings = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not settings.is_file():
        return False
    named = read_json(settings).get("auto_map")
    if not (named.get("AutoTokenizer") if isinstance(named, dict) else named):
        return False
    if not trust_remote_code:
        remedy = f"the tokenizer of {folder} is Python code; read it, then allow it with --trust-remote-code"
        raise ConfigError("trust_remote_code", False, remedy)
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("trust_remote_code", True, "needs transformers to run a tokenizer; pip install transformers")
    return True


def require(spec: ModelSpec, ok: bool, key: str, value: object, supported: str) -> None:
    """For families too: raise ModelError where config.json asks for what is not done here."""
    if not ok:
        raise ModelError(f"{spec.folder / 'config.json'}: {key} = {value!r} is not supported; supported: {supported}")


def refuse_unsupported(spec: ModelSpec) -> None:
    """Raise ModelError for what config.json asks for and nobody here does: to ignore it would give wrong text."""
    raw = spec.raw

    def check(ok: bool, key: str, value: object, supported: str) -> None:
        require(spec, ok, key, value, supported)

    rope_parameters(spec)
    check(not raw.get("use_sliding_window"), "use_sliding_window", raw.get("use_sliding_window"), "false")
    check(raw.get("hidden_act", "silu") == "silu", "hidden_act", raw.get("hidden_act"), "silu")
    fp8_block(spec.folder / "config.json", raw)
    check(spec.num_experts > 0, "num_experts", spec.num_experts, "Mixture-of-Experts models")
    check(1 <= spec.top_k <= spec.num_experts, "num_experts_per_tok", spec.top_k, f"1 to {spec.num_experts}")
    check(bool(spec.moe_layers), "mlp_only_layers", raw.get("mlp_only_layers"), "at least one layer with experts")
    check(spec.moe_intermediate_size > 0, "moe_intermediate_size", spec.moe_intermediate_size, "a positive width")
    check(spec.head_dim % 2 == 0, "head_dim", spec.head_dim, "even widths: rope turns halves")
    groups = spec.num_heads % spec.num_kv_heads == 0
    check(groups, "num_key_value_heads", spec.num_kv_heads, f"divisors of the {spec.num_heads} heads")


def rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """Rotary embedding in the newer generation's keys: rope_type, one of ROPE_TYPES, and all that this type needs.

    Older files give `rope_scaling` with `type`. Raises ModelError for what is not done here.
    """
    raw = spec.raw
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key) or {}
    by_layer = not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values())
    require(spec, not by_layer, key, given, "one mapping for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    require(spec, kind in ROPE_TYPES, f"{key}.rope_type", kind, ", ".join(ROPE_TYPES))
    part = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    require(spec, part in (None, 1), "partial_rotary_factor", part, "1")
    rope: dict[str, Any] = {**given, "rope_type": kind}
    original = rope[_ORIGINAL] = raw.get(_ORIGINAL) or given.get(_ORIGINAL) or spec.max_position
    if kind == "yarn" and given.get("factor") is None and isinstance(original, int):
        rope["factor"] = spec.max_position / original
    for name in ROPE_NEEDS[kind]:
        value = rope.get(name)
        require(spec, isinstance(value, int | float) and value > 0, f"{key}.{name}", value, "a positive number")
    for name in ROPE_MAY_HAVE:
        value = rope.get(name)
        require(spec, value is None or isinstance(value, int | float), f"{key}.{name}", value, "a number")
    return rope


def fp8_block(path: Path, raw: dict[str, Any]) -> int | None:
    """Side of the square blocks that share a factor, where weights are in FP8 as DeepSeek's; None where they are plain.

    Raises ModelError for other ways to quantize; `path` is the config.json that `raw` was read from.
    """
    given = raw.get("quantization_config")
    if not given:
        return None
    plain = f"weights in {', '.join(DTYPE_BYTES)}, or in FP8 with a factor for each block (`nonet quantize` makes them)"

    def check(ok: bool, key: str, value: object, supported: str) -> None:
        if not ok:
            raise ModelError(f"{path}: quantization_config{key} = {value!r} is not supported; supported: {supported}")

    check(isinstance(given, dict), "", given, plain)
    method, block = given.get("quant_method"), given.get("weight_block_size")
    bfloat16 = "; save it in bfloat16 first, as docs/models.md says" if method == "mxfp4" else ""
    check(method == "fp8", ".quant_method", method, plain + bfloat16)
    check(given.get("fmt", "e4m3") == "e4m3", ".fmt", given.get("fmt"), "e4m3")
    scheme = given.get("activation_scheme", "dynamic")
    check(scheme == "dynamic", ".activation_scheme", scheme, "dynamic: activations bring no factors of their own")
    square = isinstance(block, list) and len(block) == 2 and block[0] == block[1]
    check(square and isinstance(block[0], int) and block[0] > 0, ".weight_block_size", block, "[128, 128]")
    return int(block[0])


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Models that also see or hear keep the keys of their language model in `text_config`; what stands there wins."""
    text = raw.get("text_config")
    if text is None:
        return raw
    return {**raw, **text, "architectures": raw.get("architectures")}


def _spec(folder: Path, raw: dict[str, Any]) -> ModelSpec:
    heads = _count(raw, "num_attention_heads")
    layers = _count(raw, "num_hidden_layers")
    hidden = _count(raw, "hidden_size")
    rope = raw.get("rope_parameters") or {}
    generation = folder / "generation_config.json"
    eos = raw.get("eos_token_id")
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id", eos)
    return ModelSpec(
        folder=folder,
        architecture=(raw.get("architectures") or ["(none)"])[0],
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."),
        vocab_size=_count(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        max_position=int(raw.get("max_position_embeddings", 2048)),
        num_experts=int(raw.get("num_experts") or raw.get("num_local_experts") or raw.get("n_routed_experts") or 0),
        top_k=int(raw.get("num_experts_per_tok") or 0),
        moe_intermediate_size=int(raw.get("moe_intermediate_size") or raw.get("intermediate_size") or 0),
        moe_layers=_moe_layers(raw, layers),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        kv_lora_rank=int(raw.get("kv_lora_rank") or 0),
        qk_rope_head_dim=int(raw.get("qk_rope_head_dim") or 0),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        raw=raw,
    )


def width(spec: ModelSpec, key: str) -> int:
    """A size that only some models have, for families: must be there and positive. Raises ModelError."""
    value = spec.raw.get(key)
    require(spec, isinstance(value, int) and value > 0, key, value, "a positive width")
    return int(spec.raw[key])


def _count(raw: dict[str, Any], key: str) -> int:
    """A size that must be given and positive."""
    value = raw[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} = {value!r} must be a positive count")
    return value


def _moe_layers(raw: dict[str, Any], layers: int) -> tuple[int, ...]:
    """By the keys of any family: Llama 4 lists them or gives a step, DeepSeek begins with dense layers, Qwen leaves out
    those of `mlp_only_layers`; steps count from 1, but for DeepSeek's `moe_layer_freq`."""
    if raw.get("moe_layers") is not None:
        listed = tuple(int(layer) for layer in raw["moe_layers"])
        if any(not 0 <= layer < layers for layer in listed):
            raise ValueError(f"moe_layers = {raw['moe_layers']!r} must name layers 0 to {layers - 1}")
        return listed
    step = int(raw.get("decoder_sparse_step") or raw.get("interleave_moe_layer_step") or 1)
    first, every = int(raw.get("first_k_dense_replace") or 0), int(raw.get("moe_layer_freq") or 1)
    dense = set(raw.get("mlp_only_layers") or ())
    kept = (layer for layer in range(first, layers) if layer % every == 0 and (layer + 1) % step == 0)
    return tuple(layer for layer in kept if layer not in dense)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a mapping. Raises ModelError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a mapping")
    return data
