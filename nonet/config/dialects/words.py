"""The one table from the words of vLLM and TensorRT-LLM to our settings.

A word is a flag or a key, its nested keys joined by dots. Every setting of ours is a word too, by its name or its full
name, and needs no entry: most of vLLM's flags are such. Read by `arguments`, `files` and `meaning`, by `--help` and by
docs/configuration.md, which a test compares with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from nonet.config.load import leaves
from nonet.config.schema import EngineConfig, Section

Kind = Literal["text", "value", "switch", "list", "mapping"]
VLLM, TRTLLM = "vLLM", "TensorRT-LLM"


@dataclass(frozen=True)
class Said:
    """A word with its value, and where it was said: "--dtype", "wide_ep.yaml: moe_config.backend"."""

    word: str
    value: object
    origin: str


@dataclass(frozen=True)
class Word:
    """One of their words. It stands for a `setting`, or asks for a `feature` that is not built, or else `meaning`
    knows what it comes to together with others."""

    name: str
    of: str
    help: str = ""
    setting: str = ""
    feature: str = ""
    unless: tuple[object, ...] = ()  # values that ask for nothing that is missing, and are accepted
    kind: Kind = "value"  # how its flag is read

    def accepts(self, value: object) -> bool:
        """Whether a word for a missing feature has a value that does not need it."""
        return any(
            value.lower() == known.lower()
            if isinstance(value, str) and isinstance(known, str)
            else value == known and type(value) is type(known)
            for known in self.unless
        )


NODES = "serving over several hosts"
EXTERNAL = "load balancing outside the server"
ONLINE = "online balancing of experts (EPLB)"
DBO = "dual batch overlap (DBO)"
OVERLAP = "asynchronous scheduling"
GRAPHS = "capture of CUDA graphs"
COMPILE = "compilation of the model"
SPLIT = "prefill and decode on separate servers (KV transfer)"
PIPELINE = "pipeline parallelism"

_TABLE = (
    # -- vLLM: ranks and hosts
    Word("data_parallel_size_local", VLLM, "Must be data_parallel_size: all ranks are on this host."),
    Word("data_parallel_address", VLLM, feature=NODES, unless=("127.0.0.1", "localhost"), kind="text"),
    Word("data_parallel_rpc_port", VLLM, feature=NODES, unless=(29550,)),
    Word("data_parallel_start_rank", VLLM, feature=NODES, unless=(0,)),
    Word("data_parallel_backend", VLLM, feature=NODES, unless=("mp",), kind="text"),
    Word("headless", VLLM, feature=NODES, unless=(False,), kind="switch"),
    Word("data_parallel_rank", VLLM, feature=EXTERNAL),
    Word("data_parallel_hybrid_lb", VLLM, feature=EXTERNAL, unless=(False,), kind="switch"),
    Word("data_parallel_external_lb", VLLM, feature=EXTERNAL, unless=(False,), kind="switch"),
    Word("pipeline_parallel_size", VLLM, feature=PIPELINE, unless=(1,)),
    Word("distributed_executor_backend", VLLM, feature="an executor other than processes", unless=("mp",), kind="text"),
    # -- vLLM: experts
    Word("enable_eplb", VLLM, feature=ONLINE, unless=(False,), kind="switch"),
    Word("eplb_config.num_redundant_experts", VLLM, setting="num_redundant_experts"),
    Word("eplb_config.window_size", VLLM, feature=ONLINE, unless=(1000,)),
    Word("eplb_config.step_interval", VLLM, feature=ONLINE, unless=(3000,)),
    Word("eplb_config.log_balancedness", VLLM, feature=ONLINE, unless=(False,)),
    Word("eplb_config.use_async", VLLM, feature=ONLINE, unless=(False,)),
    Word("eplb_config.policy", VLLM, feature=ONLINE, unless=("default",)),
    # -- vLLM: steps
    Word("enable_dbo", VLLM, feature=DBO, unless=(False,), kind="switch"),
    Word("dbo_decode_token_threshold", VLLM, feature=DBO, unless=(32,)),
    Word("dbo_prefill_token_threshold", VLLM, feature=DBO, unless=(512,)),
    Word("async_scheduling", VLLM, feature=OVERLAP, unless=(False,), kind="switch"),
    Word("enable_chunked_prefill", VLLM, feature="steps without chunked prefill", unless=(True,), kind="switch"),
    Word("enforce_eager", VLLM, feature=GRAPHS, unless=(True,), kind="switch"),
    Word("compilation_config.cudagraph_mode", VLLM, feature=GRAPHS, unless=("NONE",)),
    Word("compilation_config.cudagraph_capture_sizes", VLLM, feature=GRAPHS, unless=([],)),
    Word("compilation_config.level", VLLM, feature=COMPILE, unless=(0,)),
    Word("compilation_config.mode", VLLM, feature=COMPILE, unless=(0, "NONE")),
    Word("kv_transfer_config", VLLM, feature=SPLIT, kind="mapping"),
    # -- vLLM: the rest
    Word("num_gpu_blocks_override", VLLM, setting="num_blocks"),
    Word("attention_config.backend", VLLM, setting="attention_backend", kind="text"),
    Word("kv_cache_dtype", VLLM, feature="a KV cache of another type than the model's", unless=("auto",), kind="text"),
    Word("quantization", VLLM, feature="quantised weights", unless=("none",), kind="text"),
    Word("disable_log_requests", VLLM, feature="logging of requests", unless=(True,), kind="switch"),
    # -- TensorRT-LLM: ranks
    Word("tp", TRTLLM, setting="tensor_parallel_size"),
    Word("tp_size", TRTLLM, setting="tensor_parallel_size"),
    Word("ep", TRTLLM, "Ranks over which experts are spread: all (enable_expert_parallel), or 1."),
    Word("ep_size", TRTLLM, "As ep."),
    Word("moe_expert_parallel_size", TRTLLM, "As ep."),
    Word("pp", TRTLLM, feature=PIPELINE, unless=(1,)),
    Word("pp_size", TRTLLM, feature=PIPELINE, unless=(1,)),
    Word("enable_attention_dp", TRTLLM, "tensor_parallel_size counts data-parallel ranks instead.", kind="switch"),
    # -- TensorRT-LLM: experts
    Word("moe_config.backend", TRTLLM, "Names a kernel library: expert_backend auto. WIDEEP: expert parallelism too."),
    Word("moe_backend", TRTLLM, "As moe_config.backend.", kind="text"),
    Word("moe_config.max_num_tokens", TRTLLM, setting="moe.max_num_tokens"),
    Word("moe_config.load_balancer", TRTLLM, "File with the three settings that follow, or these themselves."),
    Word("moe_config.load_balancer.num_slots", TRTLLM, setting="num_slots"),
    Word("moe_config.load_balancer.initial_global_assignments", TRTLLM, setting="initial_global_assignments"),
    Word("moe_config.load_balancer.layer_updates_per_iter", TRTLLM, setting="layer_updates_per_iter"),
    Word("moe_config.use_low_precision_moe_combine", TRTLLM, feature="a combine of low precision", unless=(False,)),
    # -- TensorRT-LLM: steps and cache
    Word("max_batch_size", TRTLLM, setting="max_num_seqs"),
    Word("max_num_tokens", TRTLLM, "max_num_batched_tokens in a file of TensorRT-LLM's; refused elsewhere."),
    Word("max_seq_len", TRTLLM, setting="max_model_len"),
    Word("kv_cache_free_gpu_mem_fraction", TRTLLM, setting="kv_cache_free_gpu_memory_fraction"),
    Word("kv_cache_config.free_gpu_memory_fraction", TRTLLM, setting="kv_cache_free_gpu_memory_fraction"),
    Word("kv_cache_config.enable_block_reuse", TRTLLM, setting="enable_prefix_caching"),
    Word("kv_cache_config.tokens_per_block", TRTLLM, setting="block_size"),
    Word("kv_cache_config.dtype", TRTLLM, feature="a KV cache of another type than the model's", unless=("auto",)),
    Word("cuda_graph_config", TRTLLM, f"Not built yet: {GRAPHS}. Accepted, with a note: {{}}.", kind="mapping"),
    Word("disable_overlap_scheduler", TRTLLM, feature=OVERLAP, unless=(True,), kind="switch"),
    Word("stream_interval", TRTLLM, feature="tokens streamed in bundles", unless=(1,)),
    Word("speculative_config", TRTLLM, feature="speculative decoding", kind="mapping"),
    Word("cache_transceiver_config", TRTLLM, feature=SPLIT, kind="mapping"),
    Word("dwdp_config", TRTLLM, feature="weights that travel to the tokens (DWDP)", kind="mapping"),
    Word("backend", TRTLLM, feature="a backend other than PyTorch", unless=("pytorch",), kind="text"),
    # -- files
    Word("model_path", TRTLLM, "The checkpoint's folder; model is then only its name.", kind="text"),
    Word("config", "both", "YAML file of these words, of nonet's settings, or both.", kind="text"),
    Word("extra_llm_api_options", TRTLLM, "The same, read as TensorRT-LLM's.", kind="text"),
)  # fmt: skip

WORDS: dict[str, Word] = {word.name: word for word in _TABLE}
FILES = ("config", "extra_llm_api_options")
SHORT = {
    "-tp": "tensor_parallel_size", "-dp": "data_parallel_size", "-dpl": "data_parallel_size_local",
    "-dpa": "data_parallel_address", "-dpp": "data_parallel_rpc_port", "-dpr": "data_parallel_start_rank",
    "-dpn": "data_parallel_rank", "-dpb": "data_parallel_backend", "-dph": "data_parallel_hybrid_lb",
    "-dpe": "data_parallel_external_lb", "-pp": "pipeline_parallel_size", "-ep": "enable_expert_parallel",
    "-asc": "api_server_count", "-q": "quantization",
}  # fmt: skip


@cache
def settings() -> dict[str, str]:
    """Every way to write a setting of ours -> its dotted name; but `max_num_tokens` alone, which means two things."""
    ways = {}
    for dotted in leaves().values():
        parts = dotted.split(".")
        ways.update({".".join(parts[i:]): dotted for i in range(len(parts))})
    del ways["max_num_tokens"]
    return ways


@cache
def groups() -> frozenset[str]:
    """Words that stand before others: "eplb_config", "moe_config.load_balancer", "cache"."""
    return frozenset(path.rpartition(".")[0] for path in (*settings(), *WORDS) if "." in path)


def lookup(path: str) -> str | Word | None:
    """What a word is: the dotted name of a setting of ours, one of their words, or unknown."""
    if path in settings():
        return settings()[path]
    word = WORDS.get(path)
    if word is None:  # all that stands below a feature that is not built
        return next((w for w in WORDS.values() if w.kind == "mapping" and path.startswith(f"{w.name}.")), None)
    return word


@cache
def kind_of(path: str) -> Kind | None:
    """How the value of a flag is read; None if the word is unknown."""
    found = lookup(path)
    if isinstance(found, Word):
        return found.kind if found.name == path else "value"
    if found is not None:
        return _kind(annotation(found))
    return "mapping" if path in groups() else None


def annotation(dotted: str) -> Any:
    """The type of a setting."""
    section: Any = EngineConfig
    for part in dotted.split("."):
        section = section.model_fields[part].annotation
    assert not (isinstance(section, type) and issubclass(section, Section))
    return section


def _kind(kind: Any) -> Kind:
    choices = get_args(kind) if get_origin(kind) not in (None, list, dict, Literal) else (kind,)
    for choice in choices:
        if choice is bool:
            return "switch"
        if get_origin(choice) is list:
            return "list"
        if get_origin(choice) is dict:
            return "mapping"
        if choice is str or get_origin(choice) is Literal:
            return "text"
    return "value"


def flag(path: str) -> str:
    """A word as a flag: "-" between the words up to the first dot, as vLLM writes it."""
    first, dot, rest = path.partition(".")
    return f"--{first.replace('_', '-')}{dot}{rest}"


@cache
def flags() -> tuple[str, ...]:
    """Every flag there is, for "did you mean"."""
    paths = [*settings(), *WORDS, *groups()]
    negated = [f"--no-{flag(path)[2:]}" for path in paths if kind_of(path) == "switch"]
    return (*(flag(path) for path in paths), *negated, *SHORT)


def describe(word: Word) -> str:
    """What a word comes to, for people."""
    if word.setting:
        return f"Stands for {word.setting}."
    if word.feature:
        accepted = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in word.unless)
        return f"Not built yet: {word.feature}." + (f" Accepted: {accepted}." if accepted else "")
    return word.help
