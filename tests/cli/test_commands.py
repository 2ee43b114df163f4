"""`nonet serve`, `generate` and `bench` take their arguments apart and hand them on; what they start is pretended."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from nonet.cli.main import app
from nonet.config import EngineConfig
from nonet.config.env import VARIABLES
from nonet.errors import EngineDeadError


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def cli(capsys):
    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(arguments))
        return left.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def pretend(monkeypatch):
    """pretend(module, name, function): put it in the place of a module that is not loaded."""

    def put(module: str, name: str, function: object) -> None:
        stand_in = ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return put


# -- serve ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 5])
def test_serve_hands_on_the_configuration_and_the_exit_code(cli, pretend, code):
    served: list[EngineConfig] = []
    pretend("nonet.server.processes", "serve", lambda config: served.append(config) or code)
    assert cli("serve", "nonet-tiny", "-dp", "2", "--port", "0", "--api-key", "a") == (code, "", "")
    (config,) = served
    assert (config.model.model, config.parallel.data_parallel_size) == ("nonet-tiny", 2)
    assert (config.server.port, config.server.api_key) == (0, ["a"])


def test_serve_says_what_gave_way(cli, pretend):
    pretend("nonet.server.processes", "serve", lambda config: 0)
    code, out, err = cli("serve", "nonet-tiny", "--moe-backend", "cutlass")
    assert (code, out) == (0, "")
    assert err.startswith("note: --moe-backend = 'cutlass': names a kernel library")
    assert err.count("\n") == 1


def test_serve_tells_errors_of_the_server(cli, pretend):
    def serve(config: EngineConfig) -> int:
        raise EngineDeadError("rank 1 died (SIGKILL)")

    pretend("nonet.server.processes", "serve", serve)
    assert cli("serve", "nonet-tiny") == (5, "", "error: rank 1 died (SIGKILL)\n")


def test_serve_without_what_the_server_needs(cli, pretend):
    def serve(config: EngineConfig) -> int:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    pretend("nonet.server.processes", "serve", serve)
    message = "error: the server needs fastapi, which is missing: pip install 'nonet[server]'\n"
    assert cli("serve", "nonet-tiny") == (1, "", message)


def test_a_defect_of_ours_keeps_its_traceback(pretend):
    def serve(config: EngineConfig) -> int:
        raise ModuleNotFoundError("No module named 'nonet.server.nowhere'", name="nonet.server.nowhere")

    pretend("nonet.server.processes", "serve", serve)
    with pytest.raises(ModuleNotFoundError):
        app(["serve", "nonet-tiny"])


def test_print_config_starts_nothing(cli, pretend):
    pretend("nonet.server.processes", "serve", None)
    code, out, err = cli("serve", "--print-config", "nonet-tiny", "--all2all-backend", "pplx")
    assert (code, err) == (0, "")
    assert out.startswith("# nonet ")


# -- generate ---------------------------------------------------------------------------------------------------------


def test_generate_takes_the_same_flags_beside_its_own(cli, monkeypatch, tmp_path):
    asked = []

    class Engine:
        def __init__(self, config: EngineConfig) -> None:
            asked.append(config)

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def generate(self, prompts: list[str], params: object) -> list[SimpleNamespace]:
            asked.append((prompts, params))
            return [SimpleNamespace(prompt=text, outputs=[SimpleNamespace(text="...")]) for text in prompts]

    monkeypatch.setattr("nonet.engine.llm.LLM", Engine)
    (tmp_path / "a.yaml").write_text("max_batch_size: 3\n")
    words = ["-dp", "2", "-p", "--port", "--max_tokens", "5", "--seed=7", "--config", str(tmp_path / "a.yaml")]
    code, out, err = cli("generate", "nonet-tiny", *words, "--set", "block_size=4", "-p", "two")
    assert (code, out, err) == (0, "--port...\ntwo...\n", "")
    config, (prompts, params) = asked
    assert prompts == ["--port", "two"], "what stands behind an option of its own is its value"
    assert (params.max_tokens, params.seed) == (5, 7)
    assert (config.parallel.data_parallel_size, config.cache.block_size, config.model.seed) == (2, 4, 0)
    assert config.schedule.max_num_seqs == 3


def test_generate_refuses_what_flag_and_set_say_differently(cli):
    code, out, err = cli("generate", "nonet-tiny", "-p", "a", "--block-size", "8", "--set", "block_size=4")
    assert (code, out) == (2, "")
    assert err == "error: --set block_size = 4: says the same as --block-size, which is 8; give one of the two\n"


def test_generate_and_its_own_options_are_near_too(cli):
    code, out, err = cli("generate", "nonet-tiny", "-p", "a", "--max-token", "8")
    assert (code, out, err) == (2, "", "error: --max-token = '8': unknown flag; did you mean --max-tokens?\n")


# -- bench ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["throughput", "-h"], ["--model", "m", "throughput", "--tp", "2", "-x"]]
)
def test_bench_gets_all_arguments_as_they_are(cli, pretend, words):
    got = []
    pretend("nonet.cli.bench", "main", lambda arguments: got.append(arguments) or 3)
    assert cli("bench", *words) == (3, "", "")
    assert got == [words]


def test_what_gave_way_is_a_printed_line():
    """Where nobody has set up logging, a note of `resolve` goes to standard error as it is."""
    code = (
        "from nonet.config import build_config; from nonet.config.checkpoint import read_spec; "
        "from nonet.config.resolve import resolve; "
        "resolve(build_config('nonet-tiny', all2all_backend='pplx'), read_spec('nonet-tiny'), num_gpus=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "all2all_backend = 'pplx': one rank sends to nobody: 'local' is used\n"
