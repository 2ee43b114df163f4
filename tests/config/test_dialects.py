"""The words of both dialects: how they are read, which wins, what contradicts, and how mistakes are told."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonet.config.dialects import WORDS, Given, flags, read_arguments, split_arguments
from nonet.config.dialects.words import SHORT, describe, flag, groups, kind_of, lookup
from nonet.config.dialects.words import settings as ways
from nonet.config.env import HARMLESS, MISSING, VARIABLES
from nonet.config.load import leaves
from nonet.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for variable in (*VARIABLES, *HARMLESS, *MISSING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def read(text: str, known: tuple[str, ...] = ()) -> Given:
    return read_arguments(["m", *text.split()], known=known)


def refused(arguments: str | list[str], known: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        read_arguments(["m", *(arguments.split() if isinstance(arguments, str) else arguments)], known=known)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value_of(given: Given, name: str) -> object:
    node: object = given.config
    for part in leaves()[name].split("."):
        node = getattr(node, part)
    return node


# -- the table --------------------------------------------------------------------------------------------------------


def test_no_word_means_two_things():
    assert not set(WORDS) & set(ways()), "a word of theirs is no way to write a setting of ours"
    assert len({flag(path) for path in (*ways(), *WORDS)}) == len(ways()) + len(WORDS)
    assert not [word for word in WORDS.values() if word.setting and word.feature]


def test_every_word_leads_somewhere():
    for word in WORDS.values():
        assert describe(word).endswith("."), word.name
        if word.setting:
            assert isinstance(lookup(word.setting), str), word.name
    assert all(kind_of(path) is not None for path in (*SHORT.values(), *groups()))


def test_every_setting_is_a_flag():
    for name, dotted in leaves().items():
        for path in {name, dotted} - {"max_num_tokens"}:
            assert lookup(path) == dotted
            assert flag(path) in flags()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("max_num_seqs", "--max-num-seqs"),
        ("eplb_config.window_size", "--eplb-config.window_size"),
        ("moe.load_balancer.num_slots", "--moe.load_balancer.num_slots"),
    ],
)
def test_how_a_word_looks_as_a_flag(path, wanted):
    assert flag(path) == wanted


# -- reading a command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--max-num-seqs 64", "max_num_seqs", 64),
        ("--max_num_seqs=64", "max_num_seqs", 64),
        ("--schedule.max_num_seqs 64", "max_num_seqs", 64),
        ("--moe.max_num_tokens 64", "max_num_tokens", 64),
        ("--moe-config.max_num_tokens 64", "max_num_tokens", 64),
        ("--gpu-memory-utilization .5", "gpu_memory_utilization", 0.5),
        ("--enable-prefix-caching", "enable_prefix_caching", True),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--no_enable_prefix_caching", "enable_prefix_caching", False),
        ("--enable-prefix-caching=false", "enable_prefix_caching", False),
        ("--enable-prefix-caching False", "enable_prefix_caching", False),
        ("--kv-cache-config.enable_block_reuse false", "enable_prefix_caching", False),
        ("--dtype float32", "dtype", "float32"),
        ("--max-model-len null", "max_model_len", None),
        ("--max-seq-len 99", "max_model_len", 99),
        ("--max_batch_size 9", "max_num_seqs", 9),
        ("--num-gpu-blocks-override 7", "num_blocks", 7),
        ("--served-model-name a b --port 1", "served_model_name", ["a", "b"]),
        ("--served-model-name=a", "served_model_name", ["a"]),
        ("--api-key 12", "api_key", ["12"]),
        ("--chat-template 7", "chat_template", "7"),
        ("--seed -3", "seed", -3),
        ("-tp 4", "tensor_parallel_size", 4),
        ("-dp=4", "data_parallel_size", 4),
        ("-ep", "enable_expert_parallel", True),
        ("-asc 3", "api_server_count", 3),
        ("--tp 4", "tensor_parallel_size", 4),
        ("--tp_size 4", "tensor_parallel_size", 4),
        ('--eplb-config {"num_redundant_experts":4}', "num_redundant_experts", 4),
        ("--eplb_config.num_redundant_experts 4", "num_redundant_experts", 4),
        ('--load-balancer {"num_slots":4}', "num_slots", 4),
        ('--moe-config {"load_balancer":{"num_slots":4}}', "num_slots", 4),
        ('--moe-config.load_balancer {"num_slots":4}', "num_slots", 4),
        ('--initial-global-assignments {"0":[1,0]}', "initial_global_assignments", {0: [1, 0]}),
        ("--strict", "strict", True),
        ("--trust-remote-code", "trust_remote_code", True),
        ("--trust_remote_code", "trust_remote_code", True),
        ("--no-trust-remote-code", "trust_remote_code", False),
    ],
)
def test_a_flag(text, name, value):
    given = read(text)
    assert value_of(given, name) == value
    assert given.origin[leaves()[name]].partition(":")[0] == re.split("[ =]", text)[0]
    assert [dotted for dotted, origin in given.origin.items() if origin != "default"] != []


@pytest.mark.parametrize(
    "text",
    [
        "--headless=false", "--no-enable-eplb", "--no-enable-dbo --dbo-decode-token-threshold 32",
        "--no-async-scheduling", "--enforce-eager", "--pipeline-parallel-size 1", "-pp 1",
        "--data-parallel-address localhost",
        "--data-parallel-size 4 --data-parallel-size-local 4", "--data-parallel-start-rank 0", "--quantization None",
        '--compilation-config {"cudagraph_mode":"none","level":0}', "--disable-overlap-scheduler", "--backend pytorch",
        '--eplb-config {"window_size":1000,"step_interval":3000,"log_balancedness":false,"policy":"default"}',
        "--kv-cache-dtype auto", "--kv-transfer-config null", "--cuda-graph-config null",
    ],
)  # fmt: skip
def test_words_that_ask_for_nothing_that_is_missing(text):
    given = read(text)
    assert given.notes == []
    assert given.config.model_copy(update={"parallel": read("").config.parallel}) == read("").config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--headless", "--headless = True: not built yet: serving over several hosts; leave it out"),
        ("-dp 4 -dpl 2",
         "-dpl = 2: not built yet: serving over several hosts; use 4, the data-parallel size, or leave it out"),
        ("-dpr 8", "-dpr = 8: not built yet: serving over several hosts; use 0, or leave it out"),
        ("--pp 2", "--pp = 2: not built yet: pipeline parallelism; use 1, or leave it out"),
        ("--no-enforce-eager",
         "--no-enforce-eager = False: not built yet: capture of CUDA graphs; use true, or leave it out"),
        ("--enable-eplb", "--enable-eplb = True: not built yet: online balancing of experts (EPLB); leave it out"),
        ("--eplb-config.window_size 9",
         "--eplb-config.window_size = 9: not built yet: online balancing of experts (EPLB); "
         "use 1000, or leave it out"),
        ("--kv-transfer-config.kv_role kv_both", "--kv-transfer-config.kv_role = 'kv_both': not built yet: prefill and "
         "decode on separate servers (KV transfer); leave it out"),
    ],
)  # fmt: skip
def test_words_whose_feature_is_missing_are_refused_by_name(text, message):
    assert refused(text) == message


def test_the_rest_is_left_to_the_command():
    own = {"-p": True, "--prompt": True, "--max-tokens": True, "--print-config": False}
    words = ["m", "-p", "--dtype", "-dp", "2", "--max_tokens", "3", "--print-config", "--seed=1", "--", "--port"]
    said, rest = split_arguments(words, own)
    assert [(one.word, one.value, one.origin) for one in said] == [
        ("data_parallel_size", 2, "-dp"),
        ("seed", 1, "--seed"),
    ]
    assert rest == ["m", "-p", "--dtype", "--max-tokens", "3", "--print-config", "--", "--port"]


# -- what words come to together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tp", "dp", "ep"),
    [
        ("--tp 8 --ep 8 --enable_attention_dp", 1, 8, True),
        ("--tp 8 --ep 8", 8, 1, True),
        ("--tp 8", 8, 1, False),
        ("--tp 8 --ep 1 --enable-attention-dp", 1, 8, False),
        ("--tp_size 8 --ep_size -1", 8, 1, False),
        ("--tp 8 --ep 8 --no-enable-attention-dp", 8, 1, True),
        ("--tp 2 -dp 4 --ep 8", 2, 4, True),
        ("-dp 4 --enable-attention-dp", 1, 4, False),
        ("--tp 4 --moe-backend wideep --enable-attention-dp", 1, 4, True),
        ("--moe_config.backend WideEP", 1, 1, True),
        ("--tp 4 --moe_config.backend WideEP --ep 4 -ep", 4, 1, True),
        ("--ep 1", 1, 1, False),
    ],
)
def test_ranks(text, tp, dp, ep):
    parallel = read(text).config.parallel
    assert (parallel.tensor_parallel_size, parallel.data_parallel_size) == (tp, dp)
    assert parallel.enable_expert_parallel == ep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--tp 8 --ep 4", "--ep = 4: experts are spread over all 8 ranks or over none; use 8 or 1"),
        ("--ep 32", "--ep = 32: there is one rank; use 1"),
        ("--tp 8 --ep 1 -ep", "--ep = 1: contradicts -ep; give one of the two"),
        ("--tp 8 --ep 8 --no-enable-expert-parallel",
         "--ep = 8: contradicts --no-enable-expert-parallel; give one of the two"),
        ("--tp 8 --ep 1 --moe-backend wideep", "--moe-backend = 'wideep': needs expert parallelism; --ep is 1"),
        ("--tp 2 -dp 4 --enable-attention-dp",
         "--enable-attention-dp = True: -dp is given too; give --tp alone, which then counts those ranks"),
        ("--tp 0 --ep 2", "--tp = 0: use a positive count"),
        ("--tp x --ep 2", "--tp = 'x': use a positive count"),
        ("--moe-backend cutlas", "--moe-backend = 'cutlas': use one of: AUTO, CUTEDSL, CUTLASS, TRTLLM, WIDEEP"),
        ("--max-num-tokens 64", "--max-num-tokens = 64: means two things: tokens of a step are max_num_batched_tokens, "
         "of a MoE pass moe.max_num_tokens"),
        ("--port 1 --port 2", "--port = 2: is given twice, also with 1; give it once"),
        ("-tp 2 --tp 4", "--tp = 4: says the same as -tp, which is 2; give one of the two"),
        ("--num-slots 4 --moe-config.load_balancer.num_slots 6",
         "--moe-config.load_balancer.num_slots = 6: says the same as --num-slots, which is 4; give one of the two"),
        ("n", "MODEL = 'm n': give one model; quote values that hold spaces"),
        ("--model n", "--model = 'n': says the same as MODEL, which is 'm'; give one of the two"),
    ],
)  # fmt: skip
def test_contradictions(text, message):
    assert refused(text) == message


def test_the_same_twice_is_no_contradiction():
    given = read("-tp 2 --tp 2 --moe-backend WideEP --moe-config.backend WIDEEP --port 1 --port 1")
    assert given.config.server.port == 1


def test_the_folder_of_tensorrt_llms_benchmark():
    given = read_arguments(["--model", "the/name", "--model_path", "folder"])
    assert (given.config.model.model, given.config.server.served_model_name) == ("folder", ["the/name"])
    assert given.origin["model.model"] == "--model_path"


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


def test_vllms_flags_as_a_file(file):
    path = file("model: n\ntensor-parallel-size: 2\nmax_num_seqs: 9\nserved-model-name: [a, b]\nenable-eplb: false\n")
    given = read_arguments(["--config", path])
    assert (given.config.model.model, given.config.parallel.tensor_parallel_size) == ("n", 2)
    assert given.config.server.served_model_name == ["a", "b"]
    assert given.origin["parallel.tensor_parallel_size"] == "a.yaml: tensor_parallel_size"


def test_our_sections_as_a_file(file):
    path = file("model: {model: n, seed: 3}\ncache:\nmoe: {max_num_tokens: 8, load_balancer: {num_slots: 6}}\n")
    config = read_arguments(["--config", path]).config
    assert (config.model.model, config.model.seed, config.moe.max_num_tokens) == ("n", 3, 8)
    assert config.moe.load_balancer.num_slots == 6


def test_flags_over_files_over_environment(file, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_DP_CHUNK_SIZE", "1")
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "zipf")
    path = file("dp_chunk_size: 2\nmax_batch_size: 3\nport: 4\n")
    given = read(f"--config {path} --max-num-seqs 5")
    assert (given.config.moe.dp_chunk_size, given.config.moe.routing_simulation) == (2, "zipf")
    assert (given.config.schedule.max_num_seqs, given.config.server.port) == (5, 4)
    origin = {name: where for name, where in given.origin.items() if where != "default"}
    assert origin == {
        "model.model": "MODEL",
        "moe.dp_chunk_size": "a.yaml: dp_chunk_size",
        "moe.routing_simulation": "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
        "schedule.max_num_seqs": "--max-num-seqs",
        "server.port": "a.yaml: port",
    }


def test_a_flag_takes_back_what_a_file_asks_for(file):
    path = file("enable_eplb: true\nmoe_backend: WideEP\n")
    assert "a.yaml: enable_eplb = True: not built yet" in refused(f"--config {path}")
    assert read(f"--config {path} --no-enable-eplb").config.parallel.enable_expert_parallel


def test_tokens_of_a_step_in_a_file_of_tensorrt_llm(file):
    """`max_num_tokens` at the top is its word for them; in a file that could be anybody's it is refused."""
    config = read("--config " + file("enable_attention_dp: true\nmax_num_tokens: 512\n")).config
    assert (config.schedule.max_num_batched_tokens, config.moe.max_num_tokens) == (512, None)
    path = file("max_num_tokens: 512\n", "b.yaml")
    assert read(f"--extra_llm_api_options {path}").config.schedule.max_num_batched_tokens == 512
    assert refused(f"--config {path}").startswith("b.yaml: max_num_tokens = 512: means two things")


def test_null_in_a_file_asks_for_nothing(file):
    text = "moe_config: {backend: null, load_balancer: null, max_num_tokens: null}\ncuda_graph_config: null\n"
    text += "max_batch_size: null\nspeculative_config: null\nkv_cache_config: null\n"
    assert read("--config " + file(text)).config == read("").config


def test_the_balancers_file_lies_here_or_beside_the_one_that_names_it(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.yaml").write_text("moe_config: {load_balancer: b.yaml}\n")
    (tmp_path / "inner" / "b.yaml").write_text("num_slots: 5\n")
    assert read("--config inner/a.yaml").config.moe.load_balancer.num_slots == 5
    (tmp_path / "b.yaml").write_text("num_slots: 6\n")
    given = read("--config inner/a.yaml")
    assert given.config.moe.load_balancer.num_slots == 6
    assert given.origin["moe.load_balancer.num_slots"] == "b.yaml: num_slots"
    assert read("--moe-config.load_balancer b.yaml").config.moe.load_balancer.num_slots == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe_confg: {backend: WIDEEP}",
         "a.yaml: moe_confg = {'backend': 'WIDEEP'}: unknown key; did you mean 'moe_config'?"),
        ("moe_config: {backnd: WIDEEP}", "a.yaml: moe_config.backnd = 'WIDEEP': unknown key; did you mean 'backend'?"),
        ("moe_config: {xyzzy: 1}", "a.yaml: moe_config.xyzzy = 1: unknown key; in moe_config: backend, load_balancer, "
         "max_num_tokens, use_low_precision_moe_combine"),
        ("moe_config: {load_balancer: {num_slot: 1}}",
         "a.yaml: moe_config.load_balancer.num_slot = 1: unknown key; did you mean 'num_slots'?"),
        ("tensor-paralel-size: 2",
         "a.yaml: tensor_paralel_size = 2: unknown key; did you mean 'tensor_parallel_size'?"),
        ("1: 2", "a.yaml: 1 = 2: unknown key; `nonet config` lists all settings, `nonet serve --help` all other words"),
        ("moe_config: 7", "a.yaml: moe_config = 7: is a group of settings; give a mapping"),
        ("moe_config: {load_balancer: 7}",
         "a.yaml: moe_config.load_balancer = 7: give a file, or a mapping with num_slots"),
        ("moe_config: {load_balancer: no.yaml}",
         "a.yaml: moe_config.load_balancer = 'no.yaml': cannot be read: No such file or directory"),
        ("enable_attention_dp: maybe", "a.yaml: enable_attention_dp = 'maybe': use true or false"),
        ("cuda_graph_config: {batch_sizes: [1]}",
         "a.yaml: cuda_graph_config = {'batch_sizes': [1]}: not built yet: capture of CUDA graphs; use {}, or "
         "leave it out"),
        ("block_size: 8\nkv_cache_config: {tokens_per_block: 4}",
         "a.yaml: kv_cache_config.tokens_per_block = 4: says the same as a.yaml: block_size, which is 8; give "
         "one of the two"),
        ("kv_cache_config: {tokens_per_block: 0}",
         "a.yaml: kv_cache_config.tokens_per_block = 0: input should be greater than or equal to 1"),
        ("config: b.yaml", "a.yaml: config = 'b.yaml': names a file in a file; give it on the command line"),
        ("- a", "--config = 'a.yaml': must hold a mapping of settings"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(file, text, message):
    assert refused(f"--config {file(text)}") == message


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_unknown_flag_may_be_near_one_of_the_callers():
    message = refused("--num-promts 3", ("--num-prompts",))
    assert message == "--num-promts = '3': unknown flag; did you mean --num-prompts?"
    assert refused("--num-prompts 3", ("--num-prompts",)).startswith("--num-prompts = '3': unknown flag")


words = st.sampled_from([*flags(), "-x", "--", "--no-port", "--moe-config"])
values = st.sampled_from(["0", "-1", "4", "x", "true", "null", "{}", "[1]", '{"a": 1}', "1.5", "", "nan", "é"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(words, values, st.builds("{}={}".format, words, values)), max_size=6))
def test_anything_is_a_configuration_or_one_line(arguments):
    error = None
    try:
        given_ = read_arguments(arguments)
    except ConfigError as caught:
        error = caught
    if error is None:
        assert set(given_.origin) == set(leaves().values())
    else:
        assert error.field
        assert "\n" not in str(error)


def test_reading_needs_no_torch():
    code = "import sys; from nonet.config.dialects import read_arguments; read_arguments(['m', '-tp', '2']); "
    done = subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], timeout=60, check=False)
    assert done.returncode == 0
