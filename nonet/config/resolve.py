"""Turns every "auto" and default into a value, once, against the checkpoint and the machine; refuses what cannot work.

Called by the front end before any rank starts. The result is what ranks receive; nobody edits it again. Where a value
that was asked for gives way to another, a note says so, or with `strict` the start is refused.
Knows no tensors: whether there is a GPU is passed in.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nonet import plugins
from nonet.config import env
from nonet.config.assignments import check_assignments
from nonet.config.checkpoint import DTYPE_BYTES, ModelSpec, fp8_block, needs_code, refuse_unsupported
from nonet.config.roles import AMONG_GPUS, ROLES, play
from nonet.config.schema import (
    CacheConfig,
    EngineConfig,
    LoadBalancerConfig,
    ModelConfig,
    MoeConfig,
    RuntimeConfig,
    ScheduleConfig,
    ServerConfig,
)
from nonet.errors import ConfigError, nearest

CPU_KV_CACHE_BYTES = 1 << 30
FP8_BLOCK = 128  # the block of FP8 weights that the kernels for GPUs are made for
log = logging.getLogger("nonet")


@dataclass(frozen=True)
class Note:
    """A value that was asked for and gave way to another. `strict` refuses it."""

    field: str
    value: object
    instead: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.instead}"


def resolve(config: EngineConfig, spec: ModelSpec, *, num_gpus: int) -> EngineConfig:
    """The configuration with no value left open. Values that gave way to others are logged, a line each.

    Raises ConfigError for what cannot work together, ModelError for what the model needs and nonet lacks.
    """
    resolved, notes = settle(config, spec, num_gpus=num_gpus)
    for note in notes:
        log.warning("%s", note)
    return resolved


def settle(config: EngineConfig, spec: ModelSpec, *, num_gpus: int) -> tuple[EngineConfig, list[Note]]:
    """The same without a log: the notes are returned."""
    refuse_unsupported(spec)
    if config.world_size > 1:
        env.check_network()
    device = config.parallel.device
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device == "cuda" and num_gpus < config.world_size:
        raise ConfigError("device", "cuda", f"needs {config.world_size} GPUs, {num_gpus} found; use fewer ranks or cpu")
    parallel = config.parallel.model_copy(update={"device": device})
    resolved = config.model_copy(update={"parallel": parallel})
    notes: list[Note] = []
    _check_heads(resolved, spec)
    model = _model(resolved, spec)
    resolved = resolved.model_copy(
        update={
            "model": model,
            "schedule": _schedule(resolved),
            "moe": _moe(resolved.model_copy(update={"model": model}), spec, notes),
            "runtime": _runtime(resolved),
            "server": _server(resolved),
        }
    )
    resolved = resolved.model_copy(update={"cache": _cache(resolved, spec, notes)})
    if config.runtime.strict and notes:
        raise ConfigError(notes[0].field, notes[0].value, f"{notes[0].instead}; strict refuses this")
    return resolved, notes


def _check_heads(config: EngineConfig, spec: ModelSpec) -> None:
    tp = config.parallel.tensor_parallel_size
    valid = [n for n in range(1, spec.num_heads + 1) if not _tp_problem(spec, n)]
    if _tp_problem(spec, tp):
        below = max(n for n in valid if n < tp)
        above = [n for n in valid if n > tp]
        near = f"{below} or {above[0]}" if above else f"{below}"
        raise ConfigError("tensor_parallel_size", tp, f"{_tp_problem(spec, tp)}; nearest that works: {near}")


def _tp_problem(spec: ModelSpec, tp: int) -> str | None:
    if spec.num_heads % tp:
        return f"does not divide the model's {spec.num_heads} heads"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"neither divides nor is a multiple of the model's {spec.num_kv_heads} KV heads"
    return None


def _model(config: EngineConfig, spec: ModelSpec) -> ModelConfig:
    model = config.model
    dtype = spec.dtype if model.dtype == "auto" else model.dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError("dtype", dtype, f"use one of: {', '.join(DTYPE_BYTES)}")
    length = model.max_model_len or spec.max_position
    if length > spec.max_position:
        raise ConfigError("max_model_len", length, f"the model was made for at most {spec.max_position}")
    tokenizer = model.tokenizer or str(spec.folder)
    needs_code(Path(tokenizer), model.trust_remote_code)  # what it refuses it refuses before weights are read
    update = {"dtype": dtype, "max_model_len": length, "tokenizer": tokenizer, "model": str(spec.folder)}
    return model.model_copy(update={**update, "attention_backend": _attention(config, spec, dtype)})


def _attention(config: EngineConfig, spec: ModelSpec, dtype: str) -> str:
    name, on_gpus = config.model.attention_backend, config.parallel.device == "cuda"
    if name == "auto":
        return "triton" if on_gpus and find_spec("triton") is not None else "reference"
    problem = None
    if name != "reference" and not on_gpus:
        problem = "runs on GPUs; use auto or reference"
    elif name == "triton" and find_spec(name) is None:
        problem = "the package triton is not installed; use auto or reference"
    elif name == "flashinfer" and find_spec(name) is None:
        problem = "the module flashinfer is not installed; pip install 'nonet[flashinfer]', or use auto"
    elif name == "flashinfer" and (beyond := _beyond_flashinfer(spec, dtype)):
        problem = f"{beyond}; use auto or triton"
    if problem:
        raise ConfigError("attention_backend", name, problem)
    return name


def _beyond_flashinfer(spec: ModelSpec, dtype: str) -> str | None:
    """What of the model's attention the adapter (layers/attention_flashinfer.py) has no kernel for."""
    if spec.kv_lora_rank:
        return "is not used for multi-head latent attention"
    if spec.raw.get("attention_chunk_size"):
        return "has no attention in chunks, which the model needs"
    if spec.architecture == "GptOssForCausalLM":
        return "has no sinks, which the model needs"
    if dtype == "float32":
        return "has no kernels for float32"
    if spec.head_dim not in (64, 128, 256):
        return f"has kernels for heads of 64, 128 and 256 numbers, the model's have {spec.head_dim}"
    return None


def _schedule(config: EngineConfig) -> ScheduleConfig:
    schedule = config.schedule
    if schedule.max_num_batched_tokens < schedule.max_num_seqs:
        raise ConfigError(
            "max_num_batched_tokens",
            schedule.max_num_batched_tokens,
            f"must be at least max_num_seqs ({schedule.max_num_seqs}), so that every sequence can get a token",
        )
    return schedule


def _moe(config: EngineConfig, spec: ModelSpec, notes: list[Note]) -> MoeConfig:
    moe = config.moe
    update: dict[str, object] = {"all2all_backend": _all2all(config, notes)}
    if not config.parallel.enable_expert_parallel and config.world_size > 1 and moe.combine == "exact":
        raise ConfigError("combine", "exact", "needs enable_expert_parallel: sliced experts are summed over ranks")
    if moe.fp8_dispatch:
        _check_fp8_dispatch(config, str(update["all2all_backend"]))
    if moe.expert_backend == "auto":
        update["expert_backend"] = _experts(config, spec)
    else:
        plugins.check("nonet.moe.experts", moe.expert_backend, "expert_backend")
    if moe.expert_backend in ("triton", "deepgemm") and config.parallel.device != "cuda":
        raise ConfigError("expert_backend", moe.expert_backend, "runs on GPUs; use auto or grouped")
    if moe.combine == "exact":
        if moe.expert_backend not in ("auto", "reference"):
            remedy = "combine = exact computes with the reference; use auto or reference"
            raise ConfigError("expert_backend", moe.expert_backend, remedy)
        update["expert_backend"] = "reference"
    if moe.max_num_tokens is not None and moe.max_num_tokens < config.world_size:
        raise ConfigError("max_num_tokens", moe.max_num_tokens, f"use at least one token a rank: {config.world_size}")
    if moe.dp_chunk_size is not None:
        over_all = moe.dp_chunk_size * config.world_size
        update["max_num_tokens"] = min(over_all, moe.max_num_tokens or over_all)
    update["load_balancer"] = _load_balancer(config, spec, notes)
    if moe.recorded_iterations:  # ranks may stand elsewhere
        update["expert_statistic_path"] = str(Path(moe.expert_statistic_path).expanduser().absolute())
    return moe.model_copy(update=update)


def _check_fp8_dispatch(config: EngineConfig, all2all: str) -> None:
    remedy = None
    if all2all not in AMONG_GPUS:
        remedy = f"{all2all} does not send FP8; with several ranks and expert parallelism use one of {AMONG_GPUS}"
    elif config.model.dtype != "bfloat16":
        remedy = f"rows travel in FP8 in bfloat16 models, not in {config.model.dtype}"
    elif config.moe.combine == "exact":
        remedy = "combine = exact promises the same bits over every all-to-all; leave one of them out"
    if remedy:
        raise ConfigError("fp8_dispatch", True, remedy)


def _experts(config: EngineConfig, spec: ModelSpec) -> str:
    """What `auto` comes to: on GPUs Triton, for whatever kind of experts it does."""
    if config.parallel.device != "cuda" or find_spec("triton") is None:
        return "grouped"
    block = fp8_block(spec.folder / "config.json", spec.raw)
    slices = 1 if config.parallel.enable_expert_parallel else config.world_size
    whole = spec.moe_intermediate_size % (slices * (block or 1)) == 0  # no slice begins inside a block
    rounds = config.model.dtype == "bfloat16"  # in FP8 it rounds rows, too, which float32 would notice
    return "triton" if block is None or (block == FP8_BLOCK and whole and rounds) else "grouped"


def _all2all(config: EngineConfig, notes: list[Note]) -> str:
    """How tokens travel: nothing is sent by one rank, or where experts are sliced; a role finds the backend it has."""
    moe, name = config.moe, config.moe.all2all_backend
    there = plugins.names("nonet.moe.all2all")
    if name not in ROLES:
        if "." not in name and name not in there:
            raise ConfigError("all2all_backend", name, nearest(name, [*there, *ROLES]))
        plugins.check("nonet.moe.all2all", name, "all2all_backend")
    asked = "all2all_backend" in moe.model_fields_set
    if config.world_size == 1:
        return _instead(name, "local", "one rank sends to nobody", notes if asked else [])
    if not config.parallel.enable_expert_parallel:
        why = "without enable_expert_parallel every rank has a slice of every expert"
        return _instead(name, "tensor", why, notes if asked else [])
    if name in ("local", "tensor"):
        raise ConfigError("all2all_backend", name, "moves no tokens between ranks; with expert parallelism use another")
    device = config.parallel.device
    if name in AMONG_GPUS and name not in ROLES and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("all2all_backend", name, "moves tokens between GPUs; on CPUs use shm")
    if name not in ROLES:
        return name
    return _instead(name, play(name, device), f"stands for exchange {ROLES[name].what}, on {device}", notes)


def _instead(name: str, backend: str, why: str, notes: list[Note]) -> str:
    if name != backend:
        notes.append(Note("all2all_backend", name, f"{why}: {backend!r} is used"))
    return backend


def _load_balancer(config: EngineConfig, spec: ModelSpec, notes: list[Note]) -> LoadBalancerConfig:
    balancer = config.moe.load_balancer
    if balancer.layer_updates_per_iter:
        updates = balancer.layer_updates_per_iter
        raise ConfigError("layer_updates_per_iter", updates, "online balancing is not built yet; use 0")
    redundant, slots = _slots(config, spec, notes)
    if slots < spec.num_experts:
        raise ConfigError("num_slots", slots, f"the model has {spec.num_experts} experts, and each needs a slot")
    if config.parallel.enable_expert_parallel and slots < config.world_size:
        raise ConfigError("num_slots", slots, f"each rank needs a slot; use {config.world_size}, or fewer ranks")
    if slots != spec.num_experts and not config.parallel.enable_expert_parallel:
        raise ConfigError("num_slots", slots, "replicas need enable_expert_parallel")
    if slots != spec.num_experts and slots % config.world_size:
        near = slots - slots % config.world_size
        near = near if near >= spec.num_experts else near + config.world_size
        raise ConfigError("num_slots", slots, f"does not divide over {config.world_size} ranks; nearest: {near}")
    if balancer.replica_dispatch != "even" and not config.parallel.enable_expert_parallel:
        raise ConfigError("replica_dispatch", balancer.replica_dispatch, "replicas need enable_expert_parallel")
    given = balancer.initial_global_assignments
    if given is not None:
        if balancer.num_slots == 0:
            raise ConfigError("num_slots", 0, "switches the balancer off; leave initial_global_assignments out")
        if not config.parallel.enable_expert_parallel:
            raise ConfigError("initial_global_assignments", "(given)", "needs enable_expert_parallel")
        check_assignments(given, spec.moe_layers, spec.num_experts, slots)
    return balancer.model_copy(update={"num_slots": slots, "num_redundant_experts": redundant})


def _slots(config: EngineConfig, spec: ModelSpec, notes: list[Note]) -> tuple[int, int]:
    """(slots beyond one an expert, all slots). Redundant experts are rounded up so that ranks have equally many."""
    balancer, ranks = config.moe.load_balancer, config.world_size
    slots, redundant = balancer.num_slots, balancer.num_redundant_experts
    if slots is None and balancer.initial_global_assignments:
        slots = max(spec.num_experts, len(next(iter(balancer.initial_global_assignments.values()))))
    given, slots = slots, slots or spec.num_experts
    if redundant is None:
        return slots - spec.num_experts, slots
    if given:
        beyond = slots - spec.num_experts
        if beyond != redundant:
            remedy = f"num_slots = {slots} leaves {beyond} beyond the {spec.num_experts} experts; give one of the two"
            raise ConfigError("num_redundant_experts", redundant, remedy)
        return redundant, slots
    if redundant and not config.parallel.enable_expert_parallel:
        raise ConfigError("num_redundant_experts", redundant, "replicas need enable_expert_parallel")
    if redundant:
        over = -(spec.num_experts + redundant) % ranks
        if over:
            slots = spec.num_experts + redundant + over
            what = f"{spec.num_experts + redundant} slots do not divide over {ranks} ranks: {redundant + over} are used"
            notes.append(Note("num_redundant_experts", redundant, f"{what}, {slots // ranks} slots a rank"))
            redundant += over
    return redundant, spec.num_experts + redundant


def _runtime(config: EngineConfig) -> RuntimeConfig:
    threads = config.runtime.threads_per_rank or env.omp_num_threads()
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // config.world_size)
    return config.runtime.model_copy(update={"threads_per_rank": threads})


def _server(config: EngineConfig) -> ServerConfig:
    """Clients name the model as whoever starts it does, not by the folder where it was found."""
    names = config.server.served_model_name or [config.model.model]
    return config.server.model_copy(update={"served_model_name": names})


def kv_heads_per_rank(config: EngineConfig, spec: ModelSpec) -> int:
    """KV heads that one rank holds; where there are fewer than ranks, each is replicated."""
    return max(1, spec.num_kv_heads // config.parallel.tensor_parallel_size)


def cached_parts(config: EngineConfig, spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """(heads, width) of each thing that a layer caches of a token on one rank.

    Keys and values; with multi-head latent attention the one vector that both come from, and its rotated part.
    """
    if spec.kv_lora_rank:
        return ((1, spec.kv_lora_rank + spec.qk_rope_head_dim),)
    heads = kv_heads_per_rank(config, spec)
    return (heads, spec.head_dim), (heads, spec.head_dim)


def block_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Bytes of one KV block over all layers on one rank."""
    numbers = sum(heads * width for heads, width in cached_parts(config, spec))
    return spec.num_layers * config.cache.block_size * numbers * DTYPE_BYTES[config.model.dtype]


def _cache(config: EngineConfig, spec: ModelSpec, notes: list[Note]) -> CacheConfig:
    """On CPUs the number of blocks is settled here; on GPUs a rank settles it once the weights are loaded."""
    cache = config.cache
    fraction = cache.kv_cache_free_gpu_memory_fraction
    if fraction is not None and config.parallel.device != "cuda":
        instead = "there is no GPU memory: kv_cache_memory_bytes or num_blocks decides"
        notes.append(Note("kv_cache_free_gpu_memory_fraction", fraction, instead))
        cache = cache.model_copy(update={"kv_cache_free_gpu_memory_fraction": None})
    if cache.num_blocks is not None and cache.kv_cache_memory_bytes is not None:
        raise ConfigError("num_blocks", cache.num_blocks, "kv_cache_memory_bytes is given too; give one of the two")
    if cache.num_blocks is not None:
        return cache
    if config.parallel.device == "cuda" and cache.kv_cache_memory_bytes is None:
        return cache
    memory = cache.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES
    size = block_bytes(config, spec)
    if memory < size:
        raise ConfigError("kv_cache_memory_bytes", memory, f"one block needs {size}")
    return cache.model_copy(update={"num_blocks": memory // size, "kv_cache_memory_bytes": None})
