"""Where the requests of a benchmark come from: made up, or read from a file. Each is a prompt and a length.

Used by the runners. Knows nothing of who answers: an engine in this process or a server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nonet.bench.options import DatasetOptions
from nonet.bench.words import Words
from nonet.errors import ConfigError

FLAG = "--dataset-path"
SHAREGPT_LENGTHS = (4, 1024, 2048)  # least of prompt and answer, most of a prompt, most of both: vLLM's rule


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: text or token ids, how many tokens those are (-1: unknown), and how many to generate."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


def samples(options: DatasetOptions, words: Words, *, text: bool, max_len: int | None = None) -> list[Sample]:
    """The requests that the options describe, `num_prompts` of them. Raises ConfigError.

    text: prompts must be text, since they travel to a server; else random ones are token ids. max_len: prompt and
    output together may not be longer; None if that is not known here.
    """
    rng = np.random.default_rng(options.seed)
    if options.dataset_name == "random":
        if options.dataset_path is not None:
            path = str(options.dataset_path)
            raise ConfigError(FLAG, path, "random reads no file; say which kind by --dataset-name")
        found = _random(options, words, rng, text)
    elif options.dataset_path is None:
        raise ConfigError(FLAG, None, f"{options.dataset_name} needs a file")
    elif options.dataset_name != "custom" and not words.can_count:
        raise ConfigError("--tokenizer", None, f"{options.dataset_name} needs one; give a folder with tokenizer.json")
    elif options.dataset_name == "sonnet":
        found = _sonnet(options, options.dataset_path, words, rng)
    else:
        read = _sharegpt if options.dataset_name == "sharegpt" else _custom
        found = read(options, options.dataset_path, words, max_len)
        found = _as_many(found, options, rng)
    for number, sample in enumerate(found):
        check_length(number, sample, max_len)
    return found


def check_length(number: int, sample: Sample, max_len: int | None) -> None:
    """Raise ConfigError if a request does not fit the model: it would be cut, and the run another one."""
    if max_len is not None and sample.prompt_len + sample.output_len > max_len:
        lengths = f"{sample.prompt_len} + {sample.output_len} tokens"
        raise ConfigError(f"request {number}", lengths, f"exceeds max_model_len ({max_len}); ask for shorter ones")


def _as_many(found: list[Sample], options: DatasetOptions, rng: np.random.Generator) -> list[Sample]:
    """`num_prompts` of those found: the first ones of a shuffle, or all and then again from the start."""
    if not found:
        raise ConfigError(FLAG, str(options.dataset_path), "holds no request that can be used")
    order = np.arange(len(found)) if options.disable_shuffle else rng.permutation(len(found))
    count = min(options.num_prompts, len(found)) if options.no_oversample else options.num_prompts
    return [found[order[i % len(found)]] for i in range(count)]


def _random(options: DatasetOptions, words: Words, rng: np.random.Generator, text: bool) -> list[Sample]:
    ratio = options.random_range_ratio
    prefix = words.ids(rng, options.random_prefix_len)
    out = []
    for _ in range(options.num_prompts):
        length = _between(options.input_len or options.random_input_len, ratio, rng)
        output = _between(options.output_len or options.random_output_len, ratio, rng)
        ids = prefix + words.ids(rng, length)
        if text:
            prompt, count = words.text(ids)
            out.append(Sample(prompt, count, output))
        else:
            out.append(Sample(ids, len(ids), output))
    return out


def _between(length: int, ratio: float, rng: np.random.Generator) -> int:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    return int(rng.integers(low, high + 1))


def _sonnet(options: DatasetOptions, path: Path, words: Words, rng: np.random.Generator) -> list[Sample]:
    """Prompts of one common beginning and then lines at random, until they are as long as asked for."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ConfigError(FLAG, str(path), "holds no lines of text")
    length = options.input_len or options.sonnet_input_len
    if options.sonnet_prefix_len > length:
        raise ConfigError("--sonnet-prefix-len", options.sonnet_prefix_len, f"use at most the prompt's {length}")
    counts = [words.count(line + "\n") for line in lines]

    def fill(chosen: Iterator[int], room: int) -> list[str]:
        taken = []
        for index in chosen:
            if counts[index] > room:
                break
            room -= counts[index]
            taken.append(lines[index])
        return taken

    prefix = fill((i % len(lines) for i in range(options.sonnet_prefix_len)), options.sonnet_prefix_len)
    start = "Pick as many lines as you can from these poem lines:\n"
    room = length - words.count("\n".join([start, *prefix]))
    out = []
    for _ in range(options.num_prompts):
        chosen = (int(rng.integers(len(lines))) for _ in range(max(room, 0)))
        prompt = start + "\n".join([*prefix, *fill(chosen, room)])
        out.append(Sample(prompt, words.count(prompt), options.output_len or options.sonnet_output_len))
    return out


def _sharegpt(options: DatasetOptions, path: Path, words: Words, max_len: int | None) -> list[Sample]:
    """The first question of each conversation, with as many tokens to generate as its answer has."""
    least, most_prompt, most = SHAREGPT_LENGTHS
    data = _json(path, read_text(path))
    if not isinstance(data, list):
        raise ConfigError(FLAG, str(path), "must hold a JSON list of conversations")
    wanted = options.output_len or options.sharegpt_output_len
    out = []
    for entry in data:
        turns = (entry.get("conversations") or entry.get("conversation") or []) if isinstance(entry, dict) else []
        if len(turns) < 2:
            continue
        try:
            question, answer = str(turns[0]["value"]), str(turns[1]["value"])
        except (KeyError, TypeError) as error:
            raise ConfigError(FLAG, str(path), 'turns must be mappings with "value"') from error
        length, output = words.count(question), wanted or words.count(answer)
        if length >= least and output >= least and length <= most_prompt and length + output <= (max_len or most):
            out.append(Sample(question, length, output))
    return out


def _custom(options: DatasetOptions, path: Path, words: Words, max_len: int | None) -> list[Sample]:
    wanted = options.output_len or options.custom_output_len
    if wanted == 0:
        raise ConfigError("--custom-output-len", 0, "use 1 or more, or -1 for what each line says")
    out = []
    for number, entry in json_lines(path):
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(FLAG, f"{path}:{number}", 'needs a "prompt" that is text')
        length = output_tokens(path, number, entry) if wanted == -1 else wanted
        out.append(Sample(prompt, words.count(prompt), length))
    return out


# ---------------------------------------------------------------- reading files


def output_tokens(path: Path, number: int, entry: dict[str, Any], flag: str = FLAG) -> int:
    """A line's own count of tokens to generate. Raises ConfigError."""
    value = entry.get("output_tokens")
    if type(value) is not int or value < 1:
        raise ConfigError(flag, f"{path}:{number}", 'needs "output_tokens", a count of 1 or more')
    return value


def json_lines(path: Path, flag: str = FLAG) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, mapping) of each line of a file that is not empty. Raises ConfigError."""
    for number, line in enumerate(read_text(path, flag).split("\n"), start=1):
        if line.strip():
            entry = _json(f"{path}:{number}", line, flag)
            if not isinstance(entry, dict):
                raise ConfigError(flag, f"{path}:{number}", "must be a JSON mapping")
            yield number, entry


def read_text(path: Path, flag: str = FLAG) -> str:
    """A data set's file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(flag, str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(flag, str(path), "is not text in UTF-8") from error


def _json(where: str | Path, text: str, flag: str = FLAG) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(flag, str(where), f"is not JSON: {error}") from error
