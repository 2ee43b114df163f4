"""The commands of docs/bench.md that need a server, or a data set, are taken as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nonet.bench import arguments, trtllm
from nonet.bench.trtllm import TrtllmOptions
from nonet.cli.bench import main
from tests.bench.pretend_server import Elsewhere

PAGE = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")


def commands(start: str) -> list[list[str]]:
    """What follows `nonet bench` in the page's console blocks, of commands that begin so."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"$ nonet bench {start}")]


@pytest.mark.parametrize("words", commands("serve"))
def test_against_a_server(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Elsewhere() as port:
        assert main([*words, "--port", str(port)]) == 0
    assert "Failed requests:                         0" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == ("--save-result" in words)


def test_there_are_such_commands():
    assert len(commands("serve")) >= 3
    assert len(commands("--model")) == 1


def test_tensorrts_form_is_understood():
    [words] = commands("--model")
    words.remove("throughput")
    options, rest = arguments.read(TrtllmOptions, words, refused=trtllm.REFUSED)
    assert options.streaming
    assert rest[:6] == ["--model", "NAME", "--model_path", "DIR", "--tp", "8"]
