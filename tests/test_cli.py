"""The command line without ranks: help, version, and mistakes, each one line on standard error with its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import yaml

import nonet
from nonet import errors
from nonet.cli.main import app, parse_settings
from nonet.config import load_config
from nonet.config.dialects.words import lookup
from nonet.config.schema import EngineConfig
from nonet.errors import CapacityError, ConfigError, NonetError


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(arguments))
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


def test_version(cli):
    assert cli("--version") == (0, f"{nonet.__version__}\n", "")


def test_help_names_every_command(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    commands = re.search(r"Commands:\n((?:  .*\n)+)", out)
    assert commands is not None
    named = re.findall(r"^  (\w+)", commands[1], re.MULTILINE)
    assert named == ["serve", "generate", "bench", "demo", "quantize", "models", "config", "eplb"]


def test_no_arguments_shows_help(cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nonet"])
    assert cli() == cli("--help")


@pytest.mark.parametrize("command", ["serve", "generate", "bench", "demo", "quantize", "models", "config", "eplb"])
def test_help_of_a_command(cli, command):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: nonet {command} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "No such command 'serv'. Did you mean 'serve'?"),
        (["demo", "--rank", "4"], "No such option: --rank (Possible options: --ranks)"),
        (["demo", "--ranks", "0"], "Invalid value for '--ranks': Input should be greater than or equal to 1"),
        (["generate"], "Missing option '--prompt' / '-p'."),
        (["generate", "nonet-tiny"], "Missing option '--prompt' / '-p'."),
    ],
)
def test_mistakes_of_the_command_line(cli, arguments, message):
    assert cli(*arguments) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "nowhere", "-p", "a"],
            "model = 'nowhere': no such folder; give a checkpoint's folder or one of: nonet-tiny",
        ),
        (["demo", "--model", "nowhere"],
         "model = 'nowhere': no such folder; give a checkpoint's folder or one of: nonet-tiny"),
        (["demo", "--backend", "shn"], "all2all_backend = 'shn': did you mean 'shm'?"),
        (["generate", "nonet-tiny", "-p", "a", "--set", "blok_size=4"],
         "--set blok_size = 4: unknown key; did you mean 'block_size'?"),
        (["generate", "nonet-tiny", "-p", "a", "--set", "block_size=0"],
         "--set block_size = 0: input should be greater than or equal to 1"),
        (["generate", "nonet-tiny", "-p", "a", "--set", "block_size"],
         "--set = 'block_size': use name=value, as in --set data_parallel_size=4"),
        (["generate", "nonet-tiny", "-p", "a", "--temperature", "-1"], "temperature = -1.0: use 0 (greedy) to 100"),
        (["generate", "nonet-tiny", "-p", ""], "prompt = '': must not be empty"),
    ],
)  # fmt: skip
def test_mistakes_in_settings(cli, arguments, message):
    assert cli(*arguments) == (2, "", f"error: {message}\n")


def test_a_broken_checkpoint(cli, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 4}))
    message = f"error: {path}: key 'num_hidden_layers' is missing\n"
    assert cli("generate", str(tmp_path), "-p", "a") == (3, "", message)


def test_the_table_of_errors_is_true():
    """The drawing at the top of errors.py: name, exit code, status, and who stands below whom."""
    line = r"^    ((?:\|   )*)(?:\|-- )?(\w+Error|CommTimeout)\b.*?(\d)\s+(\d{3})$"
    rows = re.findall(line, errors.__doc__ or "", re.MULTILINE)
    drawn = {name: (int(code), int(status)) for _, name, code, status in rows}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NonetError)]
    public = {kind.__name__: kind for kind in classes if not kind.__name__.startswith("_")}
    assert drawn == {name: (kind.exit_code, kind.http_status) for name, kind in public.items()}
    below = {name: len(bars) // 4 for bars, name, _, _ in rows}
    for name, kind in public.items():
        above = [one for one in kind.__mro__[1:] if one in public.values()]
        assert below[name] == max(0, len(above) - 1), name


def test_errors_keep_their_exit_code_and_stay_on_one_line(cli, monkeypatch):
    def fail(**settings: object) -> None:
        raise CapacityError("no room:\n  a lot asked")

    monkeypatch.setattr("nonet.cli.demo.run", fail)
    assert cli("demo") == (CapacityError.exit_code, "", "error: no room: a lot asked\n")


def test_a_warning_is_one_line(cli, monkeypatch):
    def warn(**settings: object) -> None:
        warnings.simplefilter("always")
        warnings.warn("mind\n  this", stacklevel=2)

    monkeypatch.setattr("nonet.cli.demo.run", warn)
    assert cli("demo") == (0, "", "warning: mind this\n")


def test_defects_keep_their_traceback(monkeypatch):
    def fail(**settings: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("nonet.cli.demo.run", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        app(["demo"])


def test_interruption(cli, monkeypatch):
    def fail(**settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nonet.cli.demo.run", fail)
    assert cli("demo") == (130, "", "")


def test_settings_are_read_as_yaml():
    pairs = ["block_size=4", "strict=true", "chat_template=x=y", "served_model_name=[a, b]", "num_blocks=",
             "max_num_tokens=8", "load_balancer={num_slots: 6}"]  # fmt: skip
    said = parse_settings(pairs)
    assert [one.value for one in said] == [4, True, "x=y", ["a", "b"], None, 8, 6]
    assert [lookup(one.word) for one in said] == [
        "cache.block_size", "runtime.strict", "server.chat_template", "server.served_model_name", "cache.num_blocks",
        "moe.max_num_tokens", "moe.load_balancer.num_slots",
    ]  # fmt: skip
    assert [one.origin for one in said[-2:]] == ["--set max_num_tokens", "--set load_balancer.num_slots"]
    with pytest.raises(ConfigError, match="is not YAML"):
        parse_settings(["block_size=[1"])


def test_config_prints_every_setting_with_its_help(cli):
    code, out, err = cli("config")
    assert (code, err) == (0, "")
    text = " ".join(re.sub(r"^\s*# ", " ", line) for line in out.splitlines())

    def check(section, tree) -> None:
        assert list(tree) == list(section.model_fields)
        for name, field in section.model_fields.items():
            assert " ".join((field.description or "").split()) in " ".join(text.split()), name
            if isinstance(tree[name], dict) and name not in ("initial_global_assignments",):
                check(field.annotation, tree[name])

    check(EngineConfig, yaml.safe_load(out))


def test_config_is_a_configuration(cli, tmp_path):
    """What it prints is read back as the defaults, once the model is named."""
    _, out, _ = cli("config")
    path = tmp_path / "nonet.yaml"
    path.write_text(out)
    assert load_config(path, model="m") == EngineConfig.model_validate({"model": {"model": "m"}})


def test_as_a_process():
    """`python -m nonet`, and that the command starts without torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nonet", "--version"],
        capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{nonet.__version__}\n")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nonet.cli.main" in loaded
    assert "torch" not in loaded
