"""Building the configuration: flat, dotted, sections, YAML and environment, who wins, and how mistakes are told."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from nonet.config import build_config, load_config
from nonet.config.env import VARIABLES, omp_num_threads
from nonet.config.load import leaves, sections
from nonet.config.schema import EngineConfig
from nonet.errors import ConfigError

SIMULATION, RANDOMIZE = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_RANDOMIZE_DP_DUMMY_INPUTS"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for variable in (*VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def walk(section: type[BaseModel]):
    for name, field in section.model_fields.items():
        yield name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk(field.annotation)


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_every_setting_and_section_says_what_it_is():
    for name, field in walk(EngineConfig):
        assert field.description, name
        assert field.description.endswith("."), name


def test_every_name_stands_once():
    names = Counter(name for name, _ in walk(EngineConfig))
    assert {name for name, count in names.items() if count > 1} == {"model"}, "which is a section and its own setting"
    assert set(leaves()) | set(sections()) == set(names)
    assert leaves()["num_slots"] == "moe.load_balancer.num_slots"
    assert sections()["load_balancer"] == "moe.load_balancer"


def test_the_tree_is_frozen():
    config = build_config("m")
    for section, name in ((config, "cache"), (config.cache, "block_size"), (config.moe.load_balancer, "num_slots")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 3)


def test_the_tree_survives_the_trip_to_a_rank():
    """As plain data, through JSON, where the keys of mappings become text."""
    import json

    config = build_config("m", num_slots=6, initial_global_assignments={0: [1, 2], 3: [0, 1]}, max_num_tokens=8)
    assert EngineConfig.model_validate(json.loads(json.dumps(config.model_dump()))) == config


def test_world_size():
    assert build_config("m").world_size == 1
    assert build_config("m", tensor_parallel_size=2, data_parallel_size=3).world_size == 6


# -- where settings come from -----------------------------------------------------------------------------------------


def test_flat_dotted_and_section_names_mean_the_same():
    flat = build_config("m", block_size=4, num_slots=6, dtype="float32", seed=3)
    names = {"model.model": "m", "cache.block_size": 4, "moe.load_balancer.num_slots": 6, "model.dtype": "float32"}
    dotted = build_config(**names, seed=3)
    nested = build_config(
        model={"model": "m", "dtype": "float32", "seed": 3}, cache={"block_size": 4}, load_balancer={"num_slots": 6}
    )
    assert flat == dotted == nested
    assert (flat.cache.block_size, flat.moe.load_balancer.num_slots, flat.model.seed) == (4, 6, 3)


def test_what_is_not_given_has_its_default():
    config = build_config("m")
    assert (config.model.model, config.model.dtype, config.cache.block_size) == ("m", "auto", 16)
    assert config.cache.enable_prefix_caching
    assert not config.parallel.enable_expert_parallel


def test_yaml_in_sections_or_flat(yaml_file):
    nested = load_config(yaml_file("model: m\ncache:\n  block_size: 4\nmoe:\n  load_balancer: {num_slots: 6}\n"))
    flat = load_config(yaml_file("model: m\nblock_size: 4\nnum_slots: 6\n"))
    assert nested == flat == build_config("m", block_size=4, num_slots=6)


def test_yaml_with_empty_sections_and_layer_numbers(yaml_file):
    text = "model: m\ncache:\nmoe:\n  load_balancer:\n    initial_global_assignments:\n      0: [1, 0]\n"
    assert load_config(yaml_file(text)) == build_config("m", initial_global_assignments={0: [1, 0]})


def test_keywords_win_over_yaml_setting_by_setting(yaml_file):
    path = yaml_file("model: m\ncache: {block_size: 4, num_blocks: 9}\nmoe: {load_balancer: {num_slots: 6}}\n")
    config = load_config(path, block_size=8, load_balancer={"layer_updates_per_iter": 1})
    assert (config.cache.block_size, config.cache.num_blocks) == (8, 9)
    balancer = config.moe.load_balancer
    assert (balancer.num_slots, balancer.layer_updates_per_iter) == (6, 1)


def test_keyword_over_yaml_over_environment_over_default(yaml_file, monkeypatch):
    assert build_config("m").moe.routing_simulation is None
    monkeypatch.setenv(SIMULATION, "zipf")
    assert build_config("m").moe.routing_simulation == "zipf"
    path = yaml_file("model: m\nrouting_simulation: round_robin\n")
    assert load_config(path).moe.routing_simulation == "round_robin"
    assert load_config(path, routing_simulation="uniform_random").moe.routing_simulation == "uniform_random"
    assert build_config("m", routing_simulation=None).moe.routing_simulation is None


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("on", True), ("0", False), ("No", False), ("", False)]
)
def test_flags_in_the_environment(monkeypatch, text, value):
    monkeypatch.setenv(RANDOMIZE, text)
    assert build_config("m").moe.randomize_dp_dummy_inputs is value


def test_a_bad_flag_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv(RANDOMIZE, "maybe")
    with pytest.raises(ConfigError, match=f"^{RANDOMIZE} = 'maybe': use 0 or 1$"):
        build_config("m")


@pytest.mark.parametrize(("text", "value"), [(None, None), ("", None), ("3", 3)])
def test_threads_in_the_environment(text, value):
    assert omp_num_threads({} if text is None else {"OMP_NUM_THREADS": text}) == value


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "4,2"])
def test_bad_threads_in_the_environment(text):
    with pytest.raises(ConfigError, match="^OMP_NUM_THREADS = .*: use a positive count$"):
        omp_num_threads({"OMP_NUM_THREADS": text})


def test_what_is_handed_in_is_not_changed():
    balancer, cache = {"num_slots": 3}, {"block_size": 4}
    build_config("m", load_balancer=balancer, layer_updates_per_iter=2, cache=cache, num_blocks=9)
    assert (balancer, cache) == ({"num_slots": 3}, {"block_size": 4})


# -- mistakes ---------------------------------------------------------------------------------------------------------


def refused(**given) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config("m", **given)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocksize", "block_size"),
        ("max_num_seq", "max_num_seqs"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("enable_expert_paralell", "enable_expert_parallel"),
        ("cache.block_sizes", "block_size"),
        ("cache.tensor_parallel_size", "parallel.tensor_parallel_size"),
        ("load_balancer.num_slots", "moe.load_balancer.num_slots"),
        ("cash.block_size", "cache.block_size"),
    ],
)
def test_an_unknown_name_names_the_nearest(name, nearest):
    message = refused(**{name: 3})
    assert message.startswith(f"{name} = 3: unknown setting; ")
    assert message.endswith(f"did you mean {nearest!r}?")


def test_a_name_like_no_other_lists_them_all():
    message = refused(xyzzy=1)
    assert message.startswith("xyzzy = 1: unknown setting; known: ")
    assert all(name in message for name in leaves())


def test_an_unknown_name_within_a_section_is_found(yaml_file):
    assert "cache.blok_size = 4: unknown setting; did you mean 'block_size'?" in refused(cache={"blok_size": 4})
    with pytest.raises(ConfigError, match=r"^moe\.load_balancer\.num_slot = 4: unknown .* did you mean 'num_slots'"):
        load_config(yaml_file("model: m\nmoe: {load_balancer: {num_slot: 4}}\n"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 0}, "cache.block_size = 0: input should be greater than or equal to 1"),
        ({"block_size": "x"}, "cache.block_size = 'x': input should be a valid integer"),
        ({"gpu_memory_utilization": 1.5}, "cache.gpu_memory_utilization = 1.5: input should be less than or equal"),
        ({"gpu_memory_utilization": float("nan")}, "cache.gpu_memory_utilization = nan: "),
        ({"dtype": "float64"}, "model.dtype = 'float64': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"combine": "quick"}, "moe.combine = 'quick': input should be 'fast' or 'exact'"),
        ({"comm_timeout_s": 0}, "runtime.comm_timeout_s = 0: input should be greater than 0"),
        ({"num_slots": -1}, "moe.load_balancer.num_slots = -1: "),
        ({"initial_global_assignments": {"x": [1]}}, "moe.load_balancer.initial_global_assignments.x"),
        ({"cache": 5}, "cache = 5: is a group of settings; give a mapping"),
        ({"load_balancer": [1]}, "load_balancer = [1]: is a group of settings; give a mapping"),
        ({"moe": {"load_balancer": 7}}, "moe.load_balancer = 7: is a group of settings; give a mapping"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_told_with_field_value_and_remedy(given, message):
    assert refused(**given).startswith(message)


def test_the_model_is_required():
    with pytest.raises(ConfigError, match="^model = None: field required$"):
        build_config()


def test_the_same_setting_twice_in_one_place_is_refused(yaml_file):
    assert "given twice" in refused(**{"block_size": 4, "cache.block_size": 8})
    with pytest.raises(ConfigError, match=r"^cache\.block_size = 4: is given twice, also with 8; give it once$"):
        load_config(yaml_file("model: m\nblock_size: 8\ncache: {block_size: 4}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "must hold a mapping"), ("", "must hold a mapping"), ("a: [", "not YAML: "), ("1: 2\n", "^1 = 2: unkn")],
)
def test_a_file_that_is_no_configuration(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(yaml_file(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


known = st.sampled_from([*leaves(), *sections(), *leaves().values()])
keys = st.one_of(known, st.text("abc_.", min_size=1, max_size=8))
values = st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.text("ab", max_size=3), st.just({}))


@settings(max_examples=200, deadline=None)
@given(given_=st.dictionaries(keys, st.one_of(values, st.dictionaries(keys, values, max_size=2)), max_size=4))
def test_anything_either_builds_or_is_a_configuration_error_of_one_line(given_):
    error = None
    try:
        config = build_config(**given_)
    except ConfigError as caught:
        error = caught
    if error is None:
        assert isinstance(config, EngineConfig)
    else:
        assert error.field
        assert "\n" not in str(error)
