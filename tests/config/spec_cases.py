"""Command lines and YAML files of the documents that people come from, as data, and what each comes to here.

Commands stand as the documents print them, comments behind backslashes included; `shell_words` reads them as they are
meant. Sources: vLLM "Expert Parallel Deployment" (December 2025), TensorRT-LLM examples/wide_ep/README.md (2025 and
January 2026), examples/wide_ep/ep_load_balancer/README.md (July 2025), and its pull request 12136 (DWDP).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

VLLM = "vLLM, Expert Parallel Deployment"
BALANCER = "TensorRT-LLM, wide_ep/ep_load_balancer"
WIDE_2025, WIDE_2026 = "TensorRT-LLM, wide_ep 2025", "TensorRT-LLM, wide_ep January 2026"
DWDP = "TensorRT-LLM, pull request 12136"

# A model of DeepSeek-V3's shape, as far as sizes matter to the configuration: 61 layers, the first 3 dense.
LARGE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "mlp_only_layers": [0, 1, 2],
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
ASSIGNMENTS = {layer: [slot % 256 for slot in range(layer, layer + 288)] for layer in range(3, 61)}

# Settings as "--print-config" shows them where their word is not the plain default.
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A command of a document with its files and variables, and what must come of it: settings or a refusal."""

    name: str
    source: str
    command: str
    settings: Settings = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refused: str = ""
    files: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def shell_words(command: str) -> list[str]:
    """A command as it is meant: what follows a backslash on its line is a comment, and the line goes on."""
    return shlex.split(re.sub(r"\\[ \t]*(#[^\n]*)?\n", " ", command), comments=True)


def arguments(command: str, folder: str) -> list[str]:
    """The same for `nonet serve`, with a folder for the model's name or path; a benchmark's own words are left out."""
    words = shell_words(command.replace("${MODEL_NAME}", "deepseek-ai/DeepSeek-R1").replace("${MODEL_PATH}", folder))
    if words[:2] == ["vllm", "serve"]:
        return ["serve", folder, *words[3:]]
    assert words[:2] == ["trtllm-llmapi-launch", "trtllm-bench"]
    assert "throughput" in words
    words = words[2:]
    words.remove("throughput")
    for option in ("--dataset", "--warmup", "--eos_id"):
        place = words.index(option)
        del words[place : place + 2]
    return ["serve", *words]


# -- vLLM -------------------------------------------------------------------------------------------------------------

ONE_NODE = """\
vllm serve deepseek-ai/DeepSeek-V3-0324 \\
    --tensor-parallel-size 1 \\       # Tensor parallelism across 1 GPU
    --data-parallel-size 8 \\         # Data parallelism across 8 processes
    --enable-expert-parallel \\       # Enable expert parallelism
    --all2all-backend pplx           # Use pplx communication backend
"""
FIRST_NODE = """\
vllm serve deepseek-ai/DeepSeek-V3-0324 \\
    --all2all-backend deepep_low_latency \\
    --tensor-parallel-size 1 \\               # TP size per node
    --enable-expert-parallel \\               # Enable EP
    --data-parallel-size 16 \\                # Total DP size across all nodes
    --data-parallel-size-local 8 \\           # Local DP size on this node (8 GPUs per node)
    --data-parallel-address 192.168.1.100 \\  # Replace with actual IP of Node 1
    --data-parallel-rpc-port 13345 \\         # RPC communication port, can be any port as long as reachable
    --api-server-count=8                     # Number of API servers for load handling
"""
SECOND_NODE = """\
vllm serve deepseek-ai/DeepSeek-V3-0324 \\
    --all2all-backend deepep_low_latency \\
    --tensor-parallel-size 1 \\               # TP size per node
    --enable-expert-parallel \\               # Enable EP
    --data-parallel-size 16 \\                # Total DP size across all nodes
    --data-parallel-size-local 8 \\           # Local DP size on this node
    --data-parallel-start-rank 8 \\           # Starting rank offset for this node
    --data-parallel-address 192.168.1.100 \\  # IP of primary node (Node 1)
    --data-parallel-rpc-port 13345 \\         # Same RPC port as primary
    --headless                               # No API server, worker only
"""
EPLB_JSON = """\
vllm serve Qwen/Qwen3-30B-A3B \\
  --enable-eplb \\
  --eplb-config '{"window_size":1000,"step_interval":3000,"num_redundant_experts":2,"log_balancedness":true}'
"""
EPLB_DOTTED = """\
vllm serve Qwen/Qwen3-30B-A3B \\
  --enable-eplb \\
  --eplb-config.window_size 1000 \\
  --eplb-config.step_interval 3000 \\
  --eplb-config.num_redundant_experts 2 \\
  --eplb-config.log_balancedness true
"""
EPLB_ONE_NODE = """\
vllm serve deepseek-ai/DeepSeek-V3-0324 \\
    --tensor-parallel-size 1 \\     # Tensor parallelism
    --data-parallel-size 8 \\       # Data parallelism
    --enable-expert-parallel \\     # Enable EP
    --all2all-backend pplx \\       # Use pplx communication backend
    --enable-eplb \\                # Enable load balancer
    --eplb-config '{"window_size":1000,"step_interval":3000,"num_redundant_experts":2,"log_balancedness":true}'
"""
EP8 = "vllm serve deepseek-ai/DeepSeek-V3-0324 --data-parallel-size 8 --enable-expert-parallel "
IN_EP8 = {"parallel.data_parallel_size": 8, "parallel.enable_expert_parallel": True}
DISAGGREGATED = "not built yet: prefill and decode on separate servers (KV transfer); leave it out"
ONLINE = "not built yet: online balancing of experts (EPLB); leave it out"
NODES = "not built yet: serving over several hosts"


def role(name: str, what: str) -> str:
    return f"all2all_backend = '{name}': stands for exchange {what}, on cpu: 'shm' is used"


ROLES = {
    "pplx": "within a node",
    "deepep_high_throughput": "for prefill",
    "deepep_low_latency": "for decode",
    "flashinfer_all2allv": "over NVLink between nodes",
}

VLLM_CASES = (
    Case("one node", VLLM, ONE_NODE,
         {**IN_EP8, "parallel.tensor_parallel_size": 1, "moe.all2all_backend": "shm"},
         (role("pplx", "within a node"),)),
    *(Case(name, VLLM, f"{EP8} --all2all-backend {name}", {**IN_EP8, "moe.all2all_backend": "shm"}, (role(name, what),))
      for name, what in ROLES.items()),
    *(Case(name, VLLM, f"{EP8} --all2all-backend {name}", {**IN_EP8, "moe.all2all_backend": name})
      for name in ("allgather_reducescatter", "naive")),
    Case("first of two nodes", VLLM, FIRST_NODE,
         refused=f"--data-parallel-address = '192.168.1.100': {NODES}; use 127.0.0.1, or leave it out"),
    Case("second of two nodes", VLLM, SECOND_NODE,
         refused=f"--data-parallel-start-rank = 8: {NODES}; use 0, or leave it out"),
    Case("EPLB by JSON", VLLM, EPLB_JSON, refused=f"--enable-eplb = True: {ONLINE}"),
    Case("EPLB by dots", VLLM, EPLB_DOTTED, refused=f"--enable-eplb = True: {ONLINE}"),
    Case("EPLB on one node", VLLM, EPLB_ONE_NODE, refused=f"--enable-eplb = True: {ONLINE}"),
    Case("redundant experts", VLLM, EP8 + """--eplb-config '{"num_redundant_experts":32}'""",
         {**IN_EP8, "moe.load_balancer.num_redundant_experts": 32, "moe.load_balancer.num_slots": 288}),
    Case("redundant experts that do not divide", VLLM, EP8 + "--eplb-config.num_redundant_experts 2",
         {**IN_EP8, "moe.load_balancer.num_redundant_experts": 8, "moe.load_balancer.num_slots": 264},
         ("num_redundant_experts = 2: 258 slots do not divide over 8 ranks: 8 are used, 33 slots a rank",)),
    Case("DBO", VLLM, EP8 + "--enable-dbo",
         refused="--enable-dbo = True: not built yet: dual batch overlap (DBO); leave it out"),
    Case("async scheduling", VLLM, EP8 + "--async-scheduling",
         refused="--async-scheduling = True: not built yet: asynchronous scheduling; leave it out"),
    Case("NIXL", VLLM, EP8 + """--kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'""",
         refused="--kv-transfer-config = {'kv_connector': 'NixlConnector', 'kv_role': 'kv_both'}: " + DISAGGREGATED),
    Case("NIXL over UCX", VLLM, EP8 + """--kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_both", \
"kv_connector_extra_config":{"backends":["UCX", "GDS"]}}'""",
         refused="--kv-transfer-config = {'kv_connector': 'NixlConnector', 'kv_role': 'kv_both', "
         "'kv_connector_extra_config': {'backends': ['UCX', 'GDS']}}: " + DISAGGREGATED),
    Case("decode alone", VLLM,
         EP8 + """--kv-transfer-config '{"kv_connector":"DecodeBenchConnector","kv_role":"kv_both"}'""",
         refused="--kv-transfer-config = {'kv_connector': 'DecodeBenchConnector', 'kv_role': 'kv_both'}: "
         + DISAGGREGATED),
    Case("graphs for decode", VLLM, EP8 + """--compilation_config '{"cudagraph_mode": "FULL_DECODE_ONLY"}'""",
         refused="--compilation_config: cudagraph_mode = 'FULL_DECODE_ONLY': "
         "not built yet: capture of CUDA graphs; use NONE, or leave it out"),
    Case("simulated routing", VLLM, EP8,
         {**IN_EP8, "moe.routing_simulation": "uniform_random", "moe.randomize_dp_dummy_inputs": True},
         variables={"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random", "VLLM_RANDOMIZE_DP_DUMMY_INPUTS": "1"}),
    Case("chunks of a rank", VLLM, EP8, {**IN_EP8, "moe.dp_chunk_size": 512, "moe.max_num_tokens": 4096},
         variables={"VLLM_MOE_DP_CHUNK_SIZE": "512", "NVSHMEM_QP_DEPTH": "2048"}),
    Case("network interface", VLLM, EP8, IN_EP8, variables={"GLOO_SOCKET_IFNAME": "lo"}),
    Case("network interface that is not there", VLLM, EP8, variables={"GLOO_SOCKET_IFNAME": "ethernet77"},
         refused="GLOO_SOCKET_IFNAME = 'ethernet77': no such network interface; here are: "),
)  # fmt: skip

# -- TensorRT-LLM -----------------------------------------------------------------------------------------------------

STATISTICS_YAML = """\
enable_attention_dp: true
cuda_graph_config: {}
moe_backend: WideEP
moe_config:
    backend: WideEP
    max_num_tokens: 8192
"""
STATISTICS = """\
trtllm-llmapi-launch \\
trtllm-bench --model ${MODEL_NAME} \\
    --model_path ${MODEL_PATH} \\
    throughput \\
    --tp 32 \\
    --ep 32 \\
    --extra_llm_api_options ./extra_llm_api_options.yaml \\
    --kv_cache_free_gpu_mem_fraction 0.75 \\
    --dataset ./dataset.json \\
    --warmup 0 \\
    --eos_id -1
"""
EPLB_YAML = """\
enable_attention_dp: true
cuda_graph_config: {}
moe_config:
    backend: WideEP
    max_num_tokens: 9216
    load_balancer: ./moe_load_balancer.yaml
"""
EPLB_RUN = """\
trtllm-llmapi-launch \\
trtllm-bench --model ${MODEL_NAME} \\
    --model_path ${MODEL_PATH} \\
    throughput \\
    --tp 36 \\
    --ep 36 \\
    --extra_llm_api_options ./extra_llm_api_options_eplb.yaml \\
    --kv_cache_free_gpu_mem_fraction 0.75 \\
    --dataset ./dataset.json \\
    --warmup 0 \\
    --eos_id -1
"""
# The document shows six lists with dots in them; these are whole.
OFFLINE_YAML = (
    f"initial_global_assignments:\n{''.join(f'  {k}: {v}{chr(10)}' for k, v in ASSIGNMENTS.items())}"
    + """\
num_slots: 288
layer_updates_per_iter: 0
"""
)
ONLINE_YAML = "num_slots: 288\nlayer_updates_per_iter: 2\n"
WIDE_YAML = """\
moe_config:
    backend: WIDEEP
    max_num_tokens: 9216
    load_balancer: moe_load_balancer.yaml # (optional) enable load balancer
"""
WIDE_ONLINE_YAML = """\
moe_config:
    backend: WIDEEP
    max_num_tokens: 9216
    load_balancer:
        num_slots: 288
        layer_updates_per_iter: 1 # (optional) enable online load balancer
"""
CONFIG = "vllm serve the-model --config wide_ep.yaml"
RUN_NOTES = (
    "{file}: cuda_graph_config = {{}}: not built yet: capture of CUDA graphs; steps run eagerly",
    "kv_cache_free_gpu_memory_fraction = 0.75: there is no GPU memory: kv_cache_memory_bytes or num_blocks decides",
)
EP = {"parallel.enable_expert_parallel": True, "moe.all2all_backend": "local"}


def run(ranks: int, tokens: int) -> Settings:
    """What a run on so many ranks with attention data parallelism comes to."""
    return {
        "parallel.tensor_parallel_size": 1,
        "parallel.data_parallel_size": ranks,
        "parallel.enable_expert_parallel": True,
        "moe.max_num_tokens": tokens,
        "moe.all2all_backend": "allgather_reducescatter",
        "cache.kv_cache_free_gpu_memory_fraction": None,
        "server.served_model_name": ["deepseek-ai/DeepSeek-R1"],
    }


def notes(file: str) -> tuple[str, ...]:
    return tuple(note.format(file=file) for note in RUN_NOTES)


def slots(count: int) -> Settings:
    return {"moe.load_balancer.num_slots": count}


IN_FILE = {**EP, "moe.max_num_tokens": 9216}
LIBRARY = "names a kernel library that nonet does not use; expert_backend decides"
STATIC = {"moe.load_balancer.initial_global_assignments": {str(k): v for k, v in ASSIGNMENTS.items()}, **slots(288)}

TRTLLM_CASES = (
    Case("collecting statistics", BALANCER, STATISTICS,
         {**run(32, 8192), "moe.expert_statistic_iter_range": "100-200",
          "moe.expert_statistic_path": "{cwd}/expert_statistic"},
         notes("extra_llm_api_options.yaml"), files={"extra_llm_api_options.yaml": STATISTICS_YAML},
         variables={"EXPERT_STATISTIC_PATH": "./expert_statistic", "EXPERT_STATISTIC_ITER_RANGE": "100-200"}),
    Case("the same without statistics", BALANCER, STATISTICS, run(32, 8192), notes("extra_llm_api_options.yaml"),
         files={"extra_llm_api_options.yaml": STATISTICS_YAML},
         variables={"EXPERT_STATISTIC_PATH": "./expert_statistic"}),
    Case("offline balancer", BALANCER, EPLB_RUN, {**run(36, 9216), **STATIC}, notes("extra_llm_api_options_eplb.yaml"),
         files={"extra_llm_api_options_eplb.yaml": EPLB_YAML, "moe_load_balancer.yaml": OFFLINE_YAML}),
    Case("online balancer", BALANCER, EPLB_RUN,
         files={"extra_llm_api_options_eplb.yaml": EPLB_YAML, "moe_load_balancer.yaml": ONLINE_YAML},
         refused="layer_updates_per_iter = 2: online balancing is not built yet; use 0"),
    Case("wide EP with a balancer's file", WIDE_2025, CONFIG, {**IN_FILE, **STATIC},
         files={"wide_ep.yaml": WIDE_YAML, "moe_load_balancer.yaml": OFFLINE_YAML}),
    Case("wide EP with online balancing", WIDE_2025, CONFIG,
         files={"wide_ep.yaml": WIDE_ONLINE_YAML.replace(" # (optional) enable online load balancer", "")},
         refused="layer_updates_per_iter = 1: online balancing is not built yet; use 0"),
    Case("several instances on a node", WIDE_2025, CONFIG, IN_FILE,
         files={"wide_ep.yaml": "moe_config: {backend: WIDEEP, max_num_tokens: 9216}\n"},
         variables={"TRTLLM_EPLB_SHM_NAME": "moe_shared"}),
    Case("wide EP with online balancing", WIDE_2026, CONFIG, files={"wide_ep.yaml": WIDE_ONLINE_YAML},
         refused="layer_updates_per_iter = 1: online balancing is not built yet; use 0"),
    *(Case(f"num_slots {count}", WIDE_2026, f"{CONFIG} --tp 32 --ep 32",
           {**slots(count or 256), "parallel.tensor_parallel_size": 32, "parallel.enable_expert_parallel": True,
            "moe.all2all_backend": "allgather_reducescatter"},
           files={"wide_ep.yaml": f"moe_config: {{backend: WIDEEP, load_balancer: {{num_slots: {count}}}}}\n"})
      for count in (0, 256, 288)),
    *(Case(f"backend {name}", WIDE_2026, CONFIG, {"moe.all2all_backend": "local"},
           (f"wide_ep.yaml: moe_config.backend = {name!r}: {LIBRARY}",),
           files={"wide_ep.yaml": f"moe_config: {{backend: {name}}}\n"})
      for name in ("CUTLASS", "trtllm", "CuteDSL")),
    Case("DWDP", DWDP, CONFIG,
         files={"wide_ep.yaml": "dwdp_config: {dwdp_size: 4, num_group: 1, experts_per_worker: 64}\n"},
         refused="wide_ep.yaml: dwdp_config = {'dwdp_size': 4, 'num_group': 1, 'experts_per_worker': 64}: "
         "not built yet: weights that travel to the tokens (DWDP); leave it out"),
)  # fmt: skip

CASES = (*VLLM_CASES, *TRTLLM_CASES)
