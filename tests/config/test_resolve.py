"""Resolving: every open value settled once, against the model and the machine, and what cannot work refused."""

from __future__ import annotations

import os

import pytest
from model_folders import write_model

from nonet import plugins
from nonet.config import build_config
from nonet.config.checkpoint import read_spec
from nonet.config.env import VARIABLES
from nonet.config.fleet import Fleet, split_evenly
from nonet.config.resolve import CPU_KV_CACHE_BYTES, block_bytes, kv_heads_per_rank, resolve
from nonet.config.roles import AMONG_GPUS, ROLES
from nonet.errors import ConfigError, ModelError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for variable in (*VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def resolved(tmp_path):
    """resolved(**settings): the configuration of the small model (12 heads, 4 KV heads, 22 experts)."""

    def run(num_gpus: int = 0, changes: dict | None = None, **settings):
        folder = write_model(tmp_path, **(changes or {}))
        return resolve(build_config(folder, **settings), read_spec(folder), num_gpus=num_gpus)

    return run


@pytest.fixture
def refused(resolved):
    """refused(**settings): the one line with which it is refused."""

    def run(num_gpus: int = 0, changes: dict | None = None, **settings) -> str:
        with pytest.raises(ConfigError) as caught:
            resolved(num_gpus, changes, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def ep(tp: int = 1, dp: int = 1, **more) -> dict:
    return {"tensor_parallel_size": tp, "data_parallel_size": dp, "enable_expert_parallel": True, **more}


def test_nothing_is_left_open(resolved):
    config = resolved()
    assert config.parallel.device == "cpu"
    assert (config.model.dtype, config.model.max_model_len) == ("bfloat16", 512)
    assert config.model.tokenizer == config.model.model
    assert os.path.isdir(config.model.model)
    assert (config.moe.all2all_backend, config.moe.load_balancer.num_slots) == ("local", 22)
    assert config.moe.expert_backend != "auto"
    assert config.cache.num_blocks
    assert config.runtime.threads_per_rank
    assert resolve(config, read_spec(config.model.model), num_gpus=0) == config, "there is nothing left to resolve"


def test_clients_name_the_model_as_it_was_given():
    config = build_config("nonet-tiny", device="cpu")
    named = resolve(config, read_spec("nonet-tiny"), num_gpus=0)
    assert os.path.isdir(named.model.model)
    assert named.server.served_model_name == ["nonet-tiny"]
    other = build_config("nonet-tiny", device="cpu", served_model_name=["a", "b"])
    assert resolve(other, read_spec("nonet-tiny"), num_gpus=0).server.served_model_name == ["a", "b"]


@pytest.mark.parametrize(("device", "here", "wanted"), [
    ("cpu", True, "reference"), ("cuda", True, "triton"), ("cuda", False, "reference"),
])  # fmt: skip
def test_what_computes_attention(resolved, monkeypatch, device, here, wanted):
    monkeypatch.setattr("nonet.config.resolve.find_spec", lambda name: object() if here else None)
    gpus = {"num_gpus": 1} if device == "cuda" else {}
    assert resolved(device=device, **gpus).model.attention_backend == wanted
    assert resolved(device=device, **gpus, attention_backend="reference").model.attention_backend == "reference"


def test_attention_kernels_that_cannot_run_are_refused(refused, monkeypatch):
    message = "attention_backend = 'triton': runs on GPUs; use auto or reference"
    assert refused(attention_backend="TRITON_ATTN", device="cpu") == message
    monkeypatch.setattr("nonet.config.resolve.find_spec", lambda name: None)
    message = "attention_backend = 'triton': the package triton is not installed; use auto or reference"
    assert refused(1, attention_backend="triton", device="cuda") == message
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHMLA")
    names = "auto, reference, triton, flashinfer, TRITON_ATTN, TRITON_MLA, FLASHINFER, TORCH_SDPA"
    assert refused() == f"VLLM_ATTENTION_BACKEND = 'FLASHMLA': use one of: {names}"


@pytest.mark.parametrize(("changes", "dtype", "problem"), [
    ({}, "float32", "has no kernels for float32"), ({"head_dim": 128}, "bfloat16", None),
    ({}, "bfloat16", "has kernels for heads of 64, 128 and 256 numbers, the model's have 8"),
    ({"kv_lora_rank": 8}, "bfloat16", "is not used for multi-head latent attention"),
    ({"attention_chunk_size": 8}, "bfloat16", "has no attention in chunks, which the model needs"),
    ({"architectures": ["GptOssForCausalLM"]}, "bfloat16", "has no sinks, which the model needs"),
])  # fmt: skip
def test_what_flashinfer_does_not_do(resolved, refused, monkeypatch, changes, dtype, problem):
    monkeypatch.setattr("nonet.config.resolve.find_spec", lambda name: object())
    settings = {"num_gpus": 1, "changes": changes, "attention_backend": "FLASHINFER", "dtype": dtype}
    if problem is None:
        assert resolved(**settings).model.attention_backend == "flashinfer"
    else:
        assert refused(**settings) == f"attention_backend = 'flashinfer': {problem}; use auto or triton"
    monkeypatch.setattr("nonet.config.resolve.find_spec", lambda name: None if name == "flashinfer" else object())
    missing = "the module flashinfer is not installed; pip install 'nonet[flashinfer]', or use auto"
    assert refused(**settings) == f"attention_backend = 'flashinfer': {missing}"


def test_what_was_given_stays(resolved):
    given = {"dtype": "float32", "max_model_len": 100, "tokenizer": "t", "num_blocks": 7, "threads_per_rank": 3}
    config = resolved(**given, expert_backend="reference", device="cpu")
    assert (config.model.dtype, config.model.max_model_len, config.model.tokenizer) == ("float32", 100, "t")
    assert (config.cache.num_blocks, config.runtime.threads_per_rank) == (7, 3)
    assert config.moe.expert_backend == "reference"


def test_a_model_that_is_not_supported_is_refused(resolved):
    with pytest.raises(ModelError, match="use_sliding_window = True is not supported"):
        resolved(changes={"use_sliding_window": True})
    with pytest.raises(ModelError, match="num_experts = 0"):
        resolved(changes={"num_experts": 0})


# -- device, type, length, threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "wanted"),
    [
        ("auto", 0, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("auto", 8, 2, "cuda"),
        ("cpu", 8, 2, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_the_device(resolved, device, gpus, ranks, wanted):
    assert resolved(gpus, device=device, **ep(dp=ranks)).parallel.device == wanted


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0), ("cuda", 1), ("auto", 1)])
def test_too_few_gpus(refused, device, gpus):
    message = refused(gpus, device=device, **ep(dp=2))
    assert message == f"device = 'cuda': needs 2 GPUs, {gpus} found; use fewer ranks or cpu"


def test_the_type_is_the_checkpoints_unless_it_is_given(resolved, refused):
    assert resolved(changes={"torch_dtype": "float16"}).model.dtype == "float16"
    assert resolved(changes={"torch_dtype": "float16"}, dtype="float32").model.dtype == "float32"
    message = refused(changes={"torch_dtype": "float8_e4m3fn"})
    assert message == "dtype = 'float8_e4m3fn': use one of: float32, bfloat16, float16"


def test_no_longer_than_the_model_was_made_for(resolved, refused):
    assert resolved(max_model_len=512).model.max_model_len == 512
    assert refused(max_model_len=513) == "max_model_len = 513: the model was made for at most 512"


def test_threads_are_given_or_from_the_environment_or_the_cores_shared(resolved, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert resolved().runtime.threads_per_rank == cores
    assert resolved(**ep(dp=2)).runtime.threads_per_rank == max(1, cores // 2)
    assert resolved(**ep(dp=22)).runtime.threads_per_rank == max(1, cores // 22)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert resolved().runtime.threads_per_rank == 7
    assert resolved(threads_per_rank=5).runtime.threads_per_rank == 5


def test_every_sequence_must_be_able_to_get_a_token(resolved, refused):
    assert resolved(max_num_seqs=32, max_num_batched_tokens=32)
    message = refused(max_num_seqs=33, max_num_batched_tokens=32)
    assert message.startswith("max_num_batched_tokens = 32: must be at least max_num_seqs (33)")


# -- heads over tensor-parallel ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 2), (4, 1), (12, 1)])
def test_tensor_parallel_sizes_that_work(resolved, tp, kv_heads):
    """12 heads and 4 KV heads: 12 ranks hold each KV head three times."""
    config = resolved(tensor_parallel_size=tp)
    assert kv_heads_per_rank(config, read_spec(config.model.model)) == kv_heads


@pytest.mark.parametrize(
    ("tp", "problem", "near"),
    [
        (3, "neither divides nor is a multiple of the model's 4 KV heads", "2 or 4"),
        (5, "does not divide the model's 12 heads", "4 or 12"),
        (6, "neither divides nor is a multiple of the model's 4 KV heads", "4 or 12"),
        (7, "does not divide the model's 12 heads", "4 or 12"),
        (13, "does not divide the model's 12 heads", "12"),
        (24, "does not divide the model's 12 heads", "12"),
    ],
)
def test_tensor_parallel_sizes_that_do_not_name_the_nearest_that_do(refused, tp, problem, near):
    assert refused(tensor_parallel_size=tp) == f"tensor_parallel_size = {tp}: {problem}; nearest that works: {near}"


@pytest.mark.parametrize("tp", range(1, 14))
def test_the_nearest_that_is_named_does_work(resolved, refused, tp):
    try:
        resolved(tensor_parallel_size=tp)
    except ConfigError as error:
        named = [int(word) for word in error.remedy.rpartition(": ")[2].split(" or ")]
    else:
        named = [tp]
    assert named
    for size in named:
        assert resolved(tensor_parallel_size=size).parallel.tensor_parallel_size == size


# -- experts and all-to-all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, "local"),
        (ep(), "local"),
        ({"tensor_parallel_size": 2}, "tensor"),
        ({"data_parallel_size": 3}, "tensor"),
        (ep(tp=2), "allgather_reducescatter"),
        (ep(dp=2, all2all_backend="shm"), "shm"),
        (ep(dp=2, all2all_backend="naive"), "naive"),
    ],
)
def test_the_all_to_all(resolved, settings, backend):
    assert resolved(**settings).moe.all2all_backend == backend


@pytest.mark.parametrize("backend", ["local", "tensor"])
def test_backends_that_move_no_tokens_are_refused_with_expert_parallelism(refused, backend):
    assert refused(**ep(dp=2), all2all_backend=backend).startswith(f"all2all_backend = '{backend}': moves no tokens")


@pytest.mark.parametrize("settings", [{}, {"data_parallel_size": 2}, ep(dp=2)])
def test_an_unknown_backend_is_refused_also_where_none_is_needed(refused, settings):
    assert refused(**settings, all2all_backend="naiv") == "all2all_backend = 'naiv': did you mean 'naive'?"
    assert refused(**settings, expert_backend="refrence") == "expert_backend = 'refrence': did you mean 'reference'?"
    for name in ("triton", "deepgemm"):
        wrong_place = refused(**settings, expert_backend=name, device="cpu")
        assert wrong_place == f"expert_backend = '{name}': runs on GPUs; use auto or grouped"


@pytest.mark.parametrize(("gpus", "block", "settings", "backend"), [
    (0, None, {}, "grouped"),
    (0, 128, {}, "grouped"),
    (1, None, {}, "triton"),
    (1, None, {"dtype": "float32"}, "triton"),
    (1, 128, {}, "triton"),
    (1, 64, {}, "grouped"),
    (1, 128, {"dtype": "float32"}, "grouped"),
    (2, 128, ep(dp=2), "triton"),
    (2, 128, {"data_parallel_size": 2}, "grouped"),  # slices of 64
])  # fmt: skip
def test_what_computes_experts_by_itself(resolved, gpus, block, settings, backend):
    pytest.importorskip("triton")
    quantized = {"quant_method": "fp8", "weight_block_size": [block, block]}
    changes = {"moe_intermediate_size": 128} | ({"quantization_config": quantized} if block else {})
    assert resolved(gpus, changes, **settings).moe.expert_backend == backend


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """The libraries that are found: Triton, and what a test adds."""
    found: set[str] = {"triton"}
    monkeypatch.setattr("nonet.config.roles.find_spec", lambda name: object() if name in found else None)
    return found


@pytest.mark.parametrize(("name", "gpus", "backend"), [
    *[(name, 0, "shm") for name in ROLES],
    ("pplx", 2, "nvlink_low_latency"),
    ("deepep_low_latency", 2, "nvlink_low_latency"),
    ("deepep_high_throughput", 2, "nvlink_high_throughput"),
    ("flashinfer_all2allv", 2, "nvlink_low_latency"),
])  # fmt: skip
def test_a_name_of_a_role_finds_the_backend_of_that_role(resolved, installed, caplog, name, gpus, backend):
    if not gpus:
        installed |= {"deep_ep", "flashinfer"}  # they run on GPUs
    config = resolved(gpus, **ep(dp=2, all2all_backend=name))
    assert config.moe.all2all_backend == backend
    (line,) = caplog.messages
    assert line.startswith(f"all2all_backend = '{name}': stands for exchange ")
    assert line.endswith(f"on {config.parallel.device}: '{backend}' is used")
    caplog.clear()
    resolve(config, read_spec(config.model.model), num_gpus=gpus)
    assert caplog.messages == [], "said once"


@pytest.mark.parametrize(("name", "library"), [(n, role.library) for n, role in ROLES.items() if role.library])
def test_a_library_that_is_installed_plays_its_role_itself(resolved, installed, caplog, name, library):
    installed.add(library)
    config = resolved(2, **ep(dp=2, all2all_backend=name, strict=True))
    assert config.moe.all2all_backend == name
    assert caplog.messages == []


def test_backends_of_roles_are_there():
    there = plugins.names("nonet.moe.all2all")
    assert {role.on_cuda for role in ROLES.values()} <= set(there)
    assert {name for name, role in ROLES.items() if role.library} <= set(there)
    assert set(AMONG_GPUS) <= set(there)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"all2all_backend": "shm"}, "one rank sends to nobody: 'local' is used"),
        (ep(all2all_backend="pplx"), "one rank sends to nobody: 'local' is used"),
        ({"data_parallel_size": 2, "all2all_backend": "naive"},
         "without enable_expert_parallel every rank has a slice of every expert: 'tensor' is used"),
    ],
)  # fmt: skip
def test_a_backend_that_was_named_and_is_not_used_is_told(resolved, refused, caplog, settings, line):
    resolved(**settings)
    note = f"all2all_backend = '{settings['all2all_backend']}': {line}"
    assert caplog.messages == [note]
    assert refused(**settings, strict=True) == f"{note}; strict refuses this"


@pytest.mark.parametrize("settings", [{}, ep(), ep(dp=2), {"data_parallel_size": 2}, ep(dp=2, all2all_backend="shm")])
def test_what_was_not_asked_for_is_not_told(resolved, caplog, settings):
    resolved(**settings, strict=True)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("over_all", "of_a_rank", "wanted"), [(None, None, None), (9, None, 9), (None, 4, 8), (6, 4, 6), (10, 4, 8)]
)
def test_the_smaller_chunk_holds(resolved, over_all, of_a_rank, wanted):
    config = resolved(max_num_tokens=over_all, dp_chunk_size=of_a_rank, **ep(dp=2))
    assert config.moe.max_num_tokens == wanted
    assert resolve(config, read_spec(config.model.model), num_gpus=0) == config


@pytest.mark.parametrize(
    ("redundant", "dp", "slots", "told"), [(0, 4, 22, 0), (2, 4, 24, 0), (1, 4, 24, 1), (3, 4, 28, 1), (2, 2, 24, 0)]
)
def test_redundant_experts_fill_every_rank(resolved, caplog, redundant, dp, slots, told):
    """22 experts: what is asked for is rounded up to a multiple of the ranks, which is told."""
    balancer = resolved(num_redundant_experts=redundant, **ep(dp=dp)).moe.load_balancer
    assert (balancer.num_slots, balancer.num_redundant_experts) == (slots, slots - 22)
    assert len(caplog.messages) == told


def test_redundant_experts_and_slots_are_the_same_thing(resolved, refused):
    assert resolved(num_slots=24, num_redundant_experts=2, **ep(dp=4)).moe.load_balancer.num_slots == 24
    message = refused(num_slots=24, num_redundant_experts=4, **ep(dp=4))
    assert message == "num_redundant_experts = 4: num_slots = 24 leaves 2 beyond the 22 experts; give one of the two"
    assert refused(num_redundant_experts=2) == "num_redundant_experts = 2: replicas need enable_expert_parallel"


def test_a_share_of_the_memory_of_gpus(resolved, refused, caplog):
    assert resolved(kv_cache_free_gpu_memory_fraction=0.5).cache.num_blocks
    assert caplog.messages == [
        "kv_cache_free_gpu_memory_fraction = 0.5: there is no GPU memory: kv_cache_memory_bytes or num_blocks decides"
    ]
    assert resolved(1, kv_cache_free_gpu_memory_fraction=0.5).cache.kv_cache_free_gpu_memory_fraction == 0.5


def test_an_interface_for_gloo_must_be_there(resolved, refused, monkeypatch):
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert resolved(**ep(dp=2)).world_size == 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    message = refused(**ep(dp=2))
    assert message == "GLOO_SOCKET_IFNAME = 'eth1': no such network interface; here are: lo, eth0"
    assert resolved().world_size == 1, "one rank needs none"


def test_exact_needs_expert_parallelism_over_ranks(resolved, refused):
    assert resolved(combine="exact").moe.expert_backend == "reference"
    assert resolved(combine="exact", **ep(dp=2)).moe.combine == "exact"
    assert refused(combine="exact", data_parallel_size=2).startswith("combine = 'exact': needs enable_expert_parallel")
    message = refused(combine="exact", expert_backend="grouped", **ep(dp=2))
    assert message == "expert_backend = 'grouped': combine = exact computes with the reference; use auto or reference"


def test_a_pass_takes_at_least_a_token_a_rank(resolved, refused):
    assert resolved(max_num_tokens=4, **ep(dp=4)).moe.max_num_tokens == 4
    assert refused(max_num_tokens=3, **ep(dp=4)) == "max_num_tokens = 3: use at least one token a rank: 4"


@pytest.mark.parametrize("slots", [None, 0, 22])
def test_a_slot_an_expert_also_where_that_is_uneven(resolved, slots):
    assert resolved(num_slots=slots, **ep(dp=4)).moe.load_balancer.num_slots == 22
    assert Fleet.even(4, 22).slots_by_rank == (6, 6, 5, 5)


@pytest.mark.parametrize(
    ("slots", "dp", "message"),
    [
        (21, 4, "num_slots = 21: the model has 22 experts, and each needs a slot"),
        (23, 4, "num_slots = 23: does not divide over 4 ranks; nearest: 24"),
        (23, 2, "num_slots = 23: does not divide over 2 ranks; nearest: 22"),
        (26, 4, "num_slots = 26: does not divide over 4 ranks; nearest: 24"),
        (27, 4, "num_slots = 27: does not divide over 4 ranks; nearest: 24"),
        (None, 23, "num_slots = 22: each rank needs a slot; use 23, or fewer ranks"),
    ],
)
def test_slots_that_do_not_work(refused, slots, dp, message):
    assert refused(num_slots=slots, **ep(dp=dp)) == message


def test_replicas_need_expert_parallelism(resolved, refused):
    assert resolved(num_slots=24, **ep(dp=4)).moe.load_balancer.num_slots == 24
    assert refused(num_slots=24, data_parallel_size=4) == "num_slots = 24: replicas need enable_expert_parallel"
    assignments = {layer: list(range(22)) for layer in range(4)}
    message = refused(initial_global_assignments=assignments, data_parallel_size=2)
    assert message == "initial_global_assignments = '(given)': needs enable_expert_parallel"


def test_assignments_are_checked_before_anything_starts(resolved, refused):
    """22 experts in 24 slots of 4 layers; without num_slots the lists say how many there are."""
    row = [*range(22), 0, 1]
    assignments = dict.fromkeys(range(4), row)
    balancer = resolved(initial_global_assignments=assignments, **ep(dp=4)).moe.load_balancer
    assert (balancer.num_slots, balancer.num_redundant_experts) == (24, 2)
    message = refused(initial_global_assignments={0: row}, **ep(dp=4))
    assert message == "initial_global_assignments = [0]: layer 1 is missing; give every MoE layer"
    message = refused(initial_global_assignments=assignments, num_slots=0, **ep(dp=4))
    assert message == "num_slots = 0: switches the balancer off; leave initial_global_assignments out"
    message = refused(initial_global_assignments=assignments, **ep(dp=5))
    assert message == "num_slots = 24: does not divide over 5 ranks; nearest: 25"


def test_iterations_to_record(resolved, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved().moe.recorded_iterations == range(0)
    assert resolved().moe.expert_statistic_path == "./expert_statistic", "nothing is recorded there"
    config = resolved(expert_statistic_iter_range="100-200")
    assert config.moe.recorded_iterations == range(100, 200)
    assert config.moe.expert_statistic_path == str(tmp_path / "expert_statistic"), "wherever ranks stand"
    assert resolve(config, read_spec(config.model.model), num_gpus=0) == config
    for text in ("100", "200-100", "5-5", "-5", "5-", "a-b", "", "1-2-3", " 1-2"):
        message = refused(expert_statistic_iter_range=text)
        remedy = "use START-STOP, as in 100-200 for iterations 100 to 199"
        assert message == f"expert_statistic_iter_range = {text!r}: {remedy}"
    monkeypatch.setenv("EXPERT_STATISTIC_ITER_RANGE", "3-7")
    monkeypatch.setenv("EXPERT_STATISTIC_PATH", "/elsewhere")
    config = resolved()
    assert (config.moe.recorded_iterations, config.moe.expert_statistic_path) == (range(3, 7), "/elsewhere")
    assert resolved(expert_statistic_iter_range="0-1").moe.recorded_iterations == range(1)
    monkeypatch.setenv("EXPERT_STATISTIC_ITER_RANGE", "3")
    with pytest.raises(ConfigError, match="EXPERT_STATISTIC_ITER_RANGE = '3': use START-STOP"):
        resolved()


def test_what_is_not_built_yet_is_refused(refused):
    message = refused(layer_updates_per_iter=2)
    assert message == "layer_updates_per_iter = 2: online balancing is not built yet; use 0"


# -- the KV cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, 8192), ({"dtype": "float32"}, 16384), ({"block_size": 4}, 2048), (ep(tp=2), 4096), (ep(tp=12), 2048)],
    ids=str,
)
def test_blocks_from_memory(resolved, settings, size):
    """A block: keys and values, 4 layers, 16 tokens, 4 KV heads on all ranks, 8 wide, 2 bytes: 8192."""
    config = resolved(kv_cache_memory_bytes=100 * size + size - 1, **settings)
    assert block_bytes(config, read_spec(config.model.model)) == size
    assert config.cache.num_blocks == 100
    assert resolved(**settings).cache.num_blocks == CPU_KV_CACHE_BYTES // size


def test_blocks_on_gpus_are_counted_later_unless_given(resolved):
    assert resolved(1).cache.num_blocks is None
    assert resolved(1, num_blocks=9).cache.num_blocks == 9
    assert resolved(1, kv_cache_memory_bytes=8192 * 5).cache.num_blocks == 5


def test_memory_for_less_than_a_block(resolved, refused):
    assert refused(kv_cache_memory_bytes=8191) == "kv_cache_memory_bytes = 8191: one block needs 8192"
    assert resolved(kv_cache_memory_bytes=8192).cache.num_blocks == 1
    both = refused(kv_cache_memory_bytes=8192, num_blocks=3)
    assert both == "num_blocks = 3: kv_cache_memory_bytes is given too; give one of the two"


# -- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "parts", "wanted"), [(6, 3, (2, 2, 2)), (7, 3, (3, 2, 2)), (2, 4, (1, 1, 0, 0)), (0, 2, (0, 0))]
)
def test_split_evenly(count, parts, wanted):
    assert split_evenly(count, parts) == wanted


def test_a_fleet_knows_where_each_rank_begins():
    fleet = Fleet((3, 0, 2))
    assert (fleet.num_ranks, fleet.num_slots, fleet.first_slot) == (3, 5, (0, 3, 3, 5))
