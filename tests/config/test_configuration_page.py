"""docs/configuration.md and `nonet serve --help` say what the code's tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nonet.cli.main import app
from nonet.config.dialects.words import SHORT, WORDS, describe, flag, groups, settings
from nonet.config.env import HARMLESS, MISSING, VARIABLES
from nonet.config.load import leaves
from nonet.config.roles import ON_CPU, ROLES

PAGE = (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")


def table(title: str) -> list[tuple[str, str]]:
    """(word, meaning) of each row below a heading."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE)


@pytest.mark.parametrize(("title", "dialects"), [("vLLM", {"vLLM"}), ("TensorRT-LLM", {"TensorRT-LLM", "both"})])
def test_the_table_of_words(title, dialects):
    wanted = [(word.name, describe(word)) for word in WORDS.values() if word.of in dialects]
    assert len(wanted) > 20
    assert table(f"Words of {title}") == wanted


def test_the_table_of_variables():
    wanted = [(name, f"Sets {leaf}.") for name, (leaf, _) in VARIABLES.items()]
    wanted += [(name, why) for name, why in HARMLESS.items()]
    wanted += [(name, f"Not built yet: {feature}; refused.") for name, feature in MISSING.items()]
    assert table("Variables") == wanted


def test_the_roles():
    section = PAGE.partition("\n## All-to-all by role\n")[2].partition("\n## ")[0]
    names = {ON_CPU, *ROLES, *(role.on_cuda for role in ROLES.values())}
    assert all(f"`{name}`" in section for name in names)


def test_the_page_names_words_that_there_are():
    """Flags in the text, and short ones, are known."""
    known = {flag(path) for path in (*settings(), *WORDS, *groups())} | {*SHORT, "--print-config", "--help"}
    folded = {name.replace("_", "-") for name in known}
    text = re.sub(r"--(?:no-)?flag\b|-{3,}", "", PAGE)
    found = set(re.findall(r"(?<![\w-])(--?[a-z][\w.-]*)", text))
    assert len(found) > 10
    assert {name for name in found if name.rstrip(".").replace("_", "-") not in folded} == set()


def test_help_lists_every_flag_and_every_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        app(["serve", "--help"])
    out = capsys.readouterr().out
    shown = set(re.findall(r"^  (?:-\w+, )?(--\S+)", out, re.MULTILINE))
    ours = {name if name != "max_num_tokens" else "moe.max_num_tokens" for name in leaves()}
    wanted = {flag(name) for name in (*ours, *WORDS)}
    assert {name.replace("[no-]", "") for name in shown} == wanted | {"--print-config", "--help"}
    flat = " ".join(out.split())
    assert all(" ".join(describe(word).split()) in flat for word in WORDS.values())
