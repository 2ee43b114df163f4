"""The configuration tree: every setting with its default and its help text.

Built by `config.load`, completed by `config.resolve`, read by every floor above. Leaf names are unique over the
whole tree and are the names users of vLLM know, so a flat keyword (`tensor_parallel_size=2`) finds its place.
Knows no tensors and no hardware.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nonet.errors import ConfigError

# vLLM's names of what computes attention, as far as nonet has the like
ATTENTION_BACKENDS = {
    "TRITON_ATTN": "triton",
    "TRITON_MLA": "triton",
    "FLASHINFER": "flashinfer",
    "TORCH_SDPA": "reference",
}


def _ours(name: object) -> object:
    return ATTENTION_BACKENDS.get(name.upper(), name) if isinstance(name, str) else name


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    model: str = Field(description="Folder of the checkpoint in Hugging Face form, or `nonet-tiny`, which is shipped.")
    tokenizer: str | None = Field(None, description="Folder of the tokenizer. Default: the model's.")
    trust_remote_code: bool = Field(
        False, description="Run the Python code of a tokenizer that has no tokenizer.json. Only from authors you trust."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and activations. auto: the checkpoint's."
    )
    attention_backend: Annotated[Literal["auto", "reference", "triton", "flashinfer"], BeforeValidator(_ours)] = Field(
        "auto",
        description="What computes attention. triton: kernels for GPUs. flashinfer: that library, if installed. "
        "reference: PyTorch, on CPUs with compiled kernels beside it. Also VLLM_ATTENTION_BACKEND.",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output in tokens. Default: the model's own limit."
    )
    seed: int = Field(0, description="Seed of requests that bring none, and of simulated routing.")


class ParallelConfig(Section):
    tensor_parallel_size: int = Field(1, ge=1, description="Ranks that share the heads of one attention replica (TP).")
    data_parallel_size: int = Field(1, ge=1, description="Attention replicas, each with requests of its own (DP).")
    enable_expert_parallel: bool = Field(
        False,
        description="Spread whole experts over all TP x DP ranks. Off: every rank holds a slice of every expert.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where ranks run. auto: cuda if there is one.")


class CacheConfig(Section):
    block_size: int = Field(
        16, ge=1, description="Tokens in one block of the KV cache. With latent attention on GPUs 64 is faster."
    )
    num_blocks: int | None = Field(
        None, ge=1, description="Blocks of the KV cache on each rank. Default: what the memory settings allow."
    )
    kv_cache_memory_bytes: int | None = Field(
        None, ge=1, description="Memory of the KV cache on each rank. Default: 1 GiB on CPU; on GPUs see next."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that weights and KV cache may fill."
    )
    kv_cache_free_gpu_memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the GPU memory left by the weights that the KV cache fills; replaces the share above.",
    )
    enable_prefix_caching: bool = Field(True, description="Keep finished blocks and reuse them for equal prefixes.")


class ScheduleConfig(Section):
    max_num_seqs: int = Field(128, ge=1, description="Sequences in one step of one data-parallel rank.")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="Tokens in one step of one data-parallel rank; longer prompts are chunked."
    )


class LoadBalancerConfig(Section):
    """Where experts live. The keys are TensorRT-LLM's."""

    num_slots: int | None = Field(None, ge=0, description="Expert slots over all ranks. Default: one an expert.")
    num_redundant_experts: int | None = Field(
        None,
        ge=0,
        description="Slots beyond one an expert, over all ranks, in place of num_slots; rounded up to fill ranks.",
    )
    initial_global_assignments: dict[int, list[int]] | None = Field(
        None, description="Layer index -> the expert in each of the num_slots slots; successive slots share a rank."
    )
    replica_dispatch: Literal["even", "waterfill", "waterfill-average"] = Field(
        "even",
        description="Which replica of an expert gets a token. even: each as many. waterfill: where ranks have least to "
        "do, by the tokens of all ranks in this step, which they exchange first. waterfill-average: the same by a "
        "running average.",
    )
    layer_updates_per_iter: int = Field(0, ge=0, description="Layers rebalanced in one step. 0: placement is static.")


class MoeConfig(Section):
    all2all_backend: str = Field(
        "allgather_reducescatter", description="How tokens travel to their experts; a file in nonet/moe/all2all."
    )
    fp8_dispatch: bool = Field(
        False,
        description="Tokens travel to their experts in FP8 with a factor for each 128 numbers: half the bytes, less "
        "exact. For bfloat16 models, over the nvlink all-to-alls and those of other libraries.",
    )
    expert_backend: str = Field("auto", description="What computes experts; a file in nonet/moe/experts.")
    combine: Literal["fast", "exact"] = Field(
        "fast",
        description="exact: one row for each (token, expert), summed in k order in float32, row by row: the same bits "
        "under every placement and all-to-all. Slow; the reference.",
    )
    max_num_tokens: int | None = Field(
        None, ge=1, description="Tokens over all ranks that one MoE pass takes; more are chunked. Default: no chunking."
    )
    dp_chunk_size: int | None = Field(
        None,
        ge=1,
        description="The same limit for the tokens of one rank; the smaller holds. Also VLLM_MOE_DP_CHUNK_SIZE.",
    )
    load_balancer: LoadBalancerConfig = Field(default_factory=LoadBalancerConfig, description="Placement of experts.")
    expert_statistic_iter_range: str | None = Field(
        None,
        description="Record which experts tokens choose, from iteration START to STOP - 1, written START-STOP, as in "
        "100-200. Also EXPERT_STATISTIC_ITER_RANGE.",
    )
    expert_statistic_path: str = Field(
        "./expert_statistic", description="Folder for what is recorded. Also EXPERT_STATISTIC_PATH."
    )
    routing_simulation: str | None = Field(
        None,
        description="Replace the router: uniform_random, round_robin, zipf[:exponent] or imbalance:<ratio>. Outputs "
        "are then meaningless. Also VLLM_MOE_ROUTING_SIMULATION_STRATEGY.",
    )
    randomize_dp_dummy_inputs: bool = Field(
        False,
        description="Ranks without work run as many random tokens as the busiest rank, and these travel: for "
        "benchmarks. Also VLLM_RANDOMIZE_DP_DUMMY_INPUTS.",
    )

    @property
    def recorded_iterations(self) -> range:
        """Those of `expert_statistic_iter_range`; none without it. Raises ConfigError."""
        if self.expert_statistic_iter_range is None:
            return range(0)
        return iteration_range("expert_statistic_iter_range", self.expert_statistic_iter_range)


class RuntimeConfig(Section):
    startup_timeout_s: float = Field(300.0, gt=0, description="Longest wait for all ranks to be ready.")
    comm_timeout_s: float = Field(60.0, gt=0, description="Longest wait of a rank for the others inside a step.")
    threads_per_rank: int | None = Field(
        None, ge=1, description="CPU threads of a rank. Default: OMP_NUM_THREADS, else the cores shared evenly."
    )
    strict: bool = Field(
        False,
        description="Refuse to start where a value would be replaced by what there is here, which otherwise is done "
        "with one printed line each.",
    )


class ServerConfig(Section):
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every one of this host.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0: one that is free.")
    api_server_count: int = Field(1, ge=1, description="Processes that answer HTTP, all on one port.")
    served_model_name: list[str] | None = Field(
        None, description="Names under which clients may ask for the model; the first is reported. Default: as given."
    )
    api_key: list[str] | None = Field(None, description="Clients must send one of these as a bearer token.")
    chat_template: str | None = Field(None, description="File with a Jinja chat template. Default: the tokenizer's.")
    trust_request_chat_template: bool = Field(
        False, description="Run the Jinja chat template that a request brings, in a sandbox. Only for trusted clients."
    )
    max_request_bytes: int = Field(8 << 20, ge=1, description="Largest body of a request; more is refused with 413.")
    shutdown_timeout_s: float = Field(
        30.0, ge=0, description="On SIGTERM open requests may go on this long; then they are aborted."
    )


def iteration_range(field: str, text: str) -> range:
    """Iterations START to STOP - 1 of "START-STOP". Raises ConfigError naming `field`."""
    start, dash, stop = text.partition("-")
    if not (dash and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ConfigError(field, text, "use START-STOP, as in 100-200 for iterations 100 to 199")
    return range(int(start), int(stop))


class EngineConfig(Section):
    """All of it."""

    model: ModelConfig = Field(description="What is served.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Ranks, and what they share.")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="The paged KV cache of each rank.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="What one step may hold.")
    moe: MoeConfig = Field(default_factory=MoeConfig, description="Experts: where they live, how tokens reach them.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="Time limits and threads.")
    server: ServerConfig = Field(default_factory=ServerConfig, description="The HTTP server; unused by scripts.")

    @property
    def world_size(self) -> int:
        return self.parallel.tensor_parallel_size * self.parallel.data_parallel_size
