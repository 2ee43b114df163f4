"""The examples of docs/serving.md run, against a server started as the page says, and its tables are complete."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nonet.openai.requests import ChatCompletionRequest, CompletionRequest
from nonet.server.metrics import COUNTERS, HISTOGRAMS
from tests.server.live import Live, live

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server():
    with live(data_parallel_size=2, num_blocks=256) as running:
        yield running


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands(server: Live):
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    curls = [line for line in lines if line.startswith("curl ")]
    outputs = [run(["sh", "-c", line.replace(ADDRESS, server.url)]) for line in curls]
    assert json.loads(outputs[0])["choices"][0]["text"]
    assert outputs[1].strip().endswith("data: [DONE]")
    assert json.loads(outputs[2])["count"] == 3
    assert "vllm:generation_tokens_total" in outputs[3]
    assert len(outputs) == 4


def test_the_client(server: Live):
    (example,) = blocks("py")
    assert len(run([sys.executable, "-c", example.replace(ADDRESS, server.url)])) > 20


def test_metrics_that_are_named_exist(server: Live):
    import httpx

    page = httpx.get(f"{server.url}/metrics").text
    named = set(re.findall(r"`((?:vllm|nonet):\w+)`", PAGE))
    assert [name for name in named if not re.search(rf"^{name}(_bucket)?[{{ ]", page, re.MULTILINE)] == []
    assert {name.removesuffix("_total") for name in named} >= {*COUNTERS, *HISTOGRAMS}


def test_fields_that_are_named_exist():
    table = PAGE.partition("## Fields")[2].partition("## Headers")[0]
    known = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= known
    assert len(named) > 40
