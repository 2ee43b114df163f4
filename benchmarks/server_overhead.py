"""What HTTP costs: tokens per second of streams through `nonet serve`, against the same engine in one process.

    python benchmarks/server_overhead.py [--model random] [--concurrency 32] [--runs 5] [--json FILE]

Exit status: 0 the ratio reaches what is required, 1 it does not or a side failed, 2 an argument is wrong, 130
interrupted.
"""

# What is measured. A random Qwen3-MoE of 61 M parameters (_random_moe.py) over 2 expert-parallel ranks (--ranks), 32
# streams at once, 32 tokens in, 64 out, greedy. `--model nonet-tiny` (11 M, 5 layers) is the harsher case: a step is
# shorter, so what HTTP costs weighs more. Of the two the default is nearer to a load that somebody serves;
# docs/performance.md has both. One side is AsyncLLM in this process: every token reaches a coroutine here. The other is
# `python -m nonet serve` with the same settings, in processes of its own, and nonet's load client in this process:
# every token goes through the server's event loop, a socket, and the client's event loop. Both take the text of every
# token. Prompts are token ids, so that neither side encodes text.
#
# How. Both engines are up and warm, and runs alternate (A B A B ...) with the same fresh random prompts on both sides;
# ranks without work sleep. A pair of runs in which other programs took more than 0.2 cores is repeated, within 3 times
# the runs asked for; pairs kept although disturbed are counted and printed. Reported: medians, their ratio, its range
# over the pairs, the CPU that server and client took, and how many texts are the same on both sides, because a ratio
# means something only if both compute the same. With few cores the client competes with the server and with the ranks,
# so the ratio contains the client's cost; its share is printed.

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _random_moe import write_model
from _sides import MARK, cpu_s, machine_cpu_s, owned_pids
from cpu_engine import device

import nonet
from nonet.bench.client import COMPLETIONS, Completions
from nonet.bench.datasets import Sample
from nonet.bench.engine import drive, words_of
from nonet.bench.http import Http
from nonet.bench.metrics import Outcome, values_of
from nonet.bench.options import ServeOptions
from nonet.bench.serve import load
from nonet.config import EngineConfig
from nonet.config.dialects import read_arguments
from nonet.engine.llm import AsyncLLM
from nonet.types import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PROMPT, OUTPUT = 32, 64
WAVES = 4  # requests of a run, in multiples of the concurrency
WARM_UP = 1
START_S, STOP_S = 180.0, 30.0
QUIET_S = 5.0
BUSY = 0.2
REQUIRED = 0.9
SIDES = ("http", "engine")
RANDOM = "random"
Pair = dict[str, dict[str, Any]]


class SideFailed(RuntimeError):
    """The server did not start, or requests failed."""


# ---------------------------------------------------------------- both sides, up


class Server:
    """`python -m nonet serve` with its ranks; `url` once it is ready."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log, mark = log, f"{MARK}={uuid.uuid4().hex}"
        self._mark = mark
        env = os.environ | dict([mark.split("=")]) | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "nonet", "serve", *arguments, "--port", "0"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    def wait_ready(self) -> str:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            found = re.search(r"http://[\d.:]+", self.log.read_text(errors="replace"))
            if found:
                return found[0]
            time.sleep(0.1)
        raise SideFailed(f"the server did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def pids(self) -> list[int]:
        return owned_pids(self.process.pid, self._mark)

    def end(self) -> None:
        """Politely, then not: nothing of it is left."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        until = time.monotonic() + 10
        while (left := self.pids()) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait(10)


@contextlib.contextmanager
def running(arguments: Sequence[str], config: EngineConfig, log: Path) -> Iterator[tuple[Server, str, AsyncLLM]]:
    """The server and its address, and the engine in this process; all ended when the block is left."""
    server = Server(arguments, log)
    try:
        url = server.wait_ready()
        llm = AsyncLLM(config)
        try:
            yield server, url, llm
        finally:
            llm.close()
    finally:
        server.end()


# ---------------------------------------------------------------- measuring


def through_http(url: str, model: str, samples: Sequence[Sample], concurrency: int) -> tuple[list[Outcome], float]:
    async def main() -> tuple[list[Outcome], float]:
        http = Http(url, {})
        extra = {"temperature": 0.0, "ignore_eos": True}
        server = Completions(http, COMPLETIONS, chat=False, model=model, extra=extra, timeout=600.0)
        options = ServeOptions(max_concurrency=concurrency, disable_tqdm=True)
        try:
            outcomes, seconds, _ = await load(server, samples, [0.0] * len(samples), options, "overhead-")
        finally:
            await http.close()
        return outcomes, seconds

    return asyncio.run(main())


def through_engine(llm: AsyncLLM, samples: Sequence[Sample], concurrency: int) -> tuple[list[Outcome], float]:
    def params(sample: Sample) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=sample.output_len, ignore_eos=True)

    return asyncio.run(drive(llm, samples, params, concurrency=concurrency))


class Clocks:
    """CPU seconds of everything that belongs to the measurement, by part."""

    def __init__(self, server: Server, llm: AsyncLLM) -> None:
        self._server, self._llm = server, llm
        self.start = self._now()

    def _now(self) -> dict[str, float]:
        mine, front = [os.getpid()], [self._server.process.pid]
        ranks = [*self._llm.client.pids, self._llm.client.supervisor_pid]
        ranks += [pid for pid in self._server.pids() if pid not in front]
        all_cpu = machine_cpu_s()
        return {"this": cpu_s(mine), "server": cpu_s(front), "ranks": cpu_s(ranks), "machine": all_cpu}

    def since(self, seconds: float) -> dict[str, float]:
        """Cores' worth of each part since the start, and of other programs."""
        now = self._now()
        used = {part: now[part] - self.start[part] for part in now}
        foreign = used["machine"] - used["this"] - used["server"] - used["ranks"]
        out = {f"{part}_cores": round(used[part] / seconds, 2) for part in ("this", "server", "ranks")}
        return out | {"other_cores": round(max(0.0, foreign) / seconds, 2)}


def one_run(side: str, server: Server, url: str, llm: AsyncLLM, samples: Sequence[Sample], args: Any) -> dict[str, Any]:
    clocks, began = Clocks(server, llm), time.perf_counter()
    if side == "http":
        outcomes, seconds = through_http(url, args.model, samples, args.concurrency)
    else:
        outcomes, seconds = through_engine(llm, samples, args.concurrency)
    cores = clocks.since(time.perf_counter() - began)
    errors = [o.error or "too few tokens" for o in outcomes if o.error or o.output_len != OUTPUT]
    if errors:
        raise SideFailed(f"{side}: {len(errors)} of {len(outcomes)} requests failed; the first: {errors[0]}")
    return {
        "seconds": seconds,
        "tokens_per_s": sum(o.output_len for o in outcomes) / seconds,
        "ttft_ms": 1000 * statistics.median(values_of("ttft", outcomes)),
        "tpot_ms": 1000 * statistics.median(values_of("tpot", outcomes)),
        "texts": [o.text for o in outcomes],
        **cores,
        "load_average": os.getloadavg()[0],
    }


def wait_for_quiet() -> None:
    """Waits until other programs leave the machine alone; at most QUIET_S."""
    until = time.monotonic() + QUIET_S
    while time.monotonic() < until:
        before = machine_cpu_s()
        time.sleep(0.2)
        if machine_cpu_s() - before <= BUSY * 0.2:
            return


def alternate(server: Server, url: str, llm: AsyncLLM, args: Any) -> list[Pair]:
    """Runs A B A B, the two of a pair with the same prompts: `runs` pairs, quiet ones if there are enough."""
    import numpy as np

    words, _ = words_of(llm.config)
    rng = np.random.default_rng(args.seed)
    quiet: list[Pair] = []
    disturbed: list[Pair] = []
    for number in range(WARM_UP + 3 * args.runs):
        samples = [Sample(words.ids(rng, PROMPT), PROMPT, OUTPUT) for _ in range(WAVES * args.concurrency)]
        wait_for_quiet()
        order = SIDES if number % 2 else SIDES[::-1]  # neither side is always the second
        pair = {side: one_run(side, server, url, llm, samples, args) for side in order}
        if number < WARM_UP:
            continue
        spoilt = max(run["other_cores"] for run in pair.values()) > BUSY
        (disturbed if spoilt else quiet).append(pair)
        speeds = " ".join(f"{side} {pair[side]['tokens_per_s']:,.0f}" for side in SIDES)
        print(f"  {speeds} tokens/s{' (disturbed)' if spoilt else ''}", flush=True)
        if len(quiet) == args.runs:
            break
    disturbed.sort(key=lambda pair: max(run["other_cores"] for run in pair.values()))
    return (quiet + disturbed)[: args.runs]


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    keys = ("tokens_per_s", "ttft_ms", "tpot_ms", "this_cores", "server_cores", "ranks_cores")
    out: dict[str, Any] = {
        side: {key: statistics.median(pair[side][key] for pair in pairs) for key in keys} for side in SIDES
    }
    out["ratio"] = out["http"]["tokens_per_s"] / out["engine"]["tokens_per_s"]
    ratios = [pair["http"]["tokens_per_s"] / pair["engine"]["tokens_per_s"] for pair in pairs]
    out["ratio_range"] = [min(ratios), max(ratios)]
    texts = [(pair["http"]["texts"], pair["engine"]["texts"]) for pair in pairs]
    out["texts_agree"] = statistics.fmean(x == y for a, b in texts for x, y in zip(a, b, strict=True))
    out["other_cores"] = max(run["other_cores"] for pair in pairs for run in pair.values())
    out["disturbed_pairs"] = sum(max(run["other_cores"] for run in pair.values()) > BUSY for pair in pairs)
    return out


# ---------------------------------------------------------------- the report


def show(found: dict[str, Any]) -> None:
    print(f"\n{'':28}{'HTTP':>12}{'in process':>12}")
    for label, key in (
        ("output tokens/s", "tokens_per_s"),
        ("first token, ms", "ttft_ms"),
        ("per output token, ms", "tpot_ms"),
        ("cores: client or front end", "this_cores"),
        ("cores: server's front end", "server_cores"),
        ("cores: ranks", "ranks_cores"),
    ):
        print(f"{label:<28}{found['http'][key]:>12,.2f}{found['engine'][key]:>12,.2f}")
    low, high = found["ratio_range"]
    print(f"HTTP / in process: {found['ratio']:.3f} ({low:.3f} to {high:.3f}), required {REQUIRED}")
    print(
        f"texts that agree: {found['texts_agree']:.0%}; cores taken by others, at most: {found['other_cores']:.2f}; "
        f"disturbed pairs: {found['disturbed_pairs']}",
        flush=True,
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if args.model == RANDOM:
        args.model = str(folder / RANDOM)
        write_model(Path(args.model))
    parallel = ["--data-parallel-size", str(args.ranks), "--enable-expert-parallel", "--all2all-backend", "shm"]
    arguments = [args.model, *(parallel if args.ranks > 1 else [])]
    versions = {"nonet": nonet.__version__, **{name: version(name) for name in ("torch", "uvicorn", "fastapi")}}
    report: dict[str, Any] = {
        "device": device(),
        "versions": versions,
        "settings": arguments,
        "concurrency": args.concurrency,
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "requests_a_run": WAVES * args.concurrency,
        "runs": args.runs,
        "seed": args.seed,
        "load_average_at_start": os.getloadavg(),
    }
    print(f"device: {report['device']}\nversions: {versions}\nsettings: {' '.join(arguments)}")
    print(f"{args.concurrency} streams at once, {PROMPT} in / {OUTPUT} out, {report['requests_a_run']} requests a run")
    with running(arguments, read_arguments(arguments).config, folder / "server.log") as (server, url, llm):
        pairs = alternate(server, url, llm, args)
    found = summary(pairs)
    show(found)
    each = [{side: {k: v for k, v in run.items() if k != "texts"} for side, run in pair.items()} for pair in pairs]
    return {**report, **found, "each_pair": each, "load_average_at_end": os.getloadavg()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default=RANDOM, help="random (61 M parameters, written here), nonet-tiny, or a checkpoint's folder"
    )
    parser.add_argument("--ranks", default=2, type=int, help="data-parallel ranks that share the experts")
    parser.add_argument("--concurrency", default=32, type=int, help="streams at once")
    parser.add_argument("--runs", default=5, type=int, help="counted runs of each side")
    parser.add_argument("--seed", default=time.time_ns(), type=int, help="of the prompts; default: another each time")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    if min(args.runs, args.ranks, args.concurrency) < 1:
        parser.error("--runs, --ranks and --concurrency must be 1 or more")
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: clean up as on Ctrl-C
    try:
        with tempfile.TemporaryDirectory(prefix="server-overhead-") as folder:
            report = measure(args, Path(folder))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    except SideFailed as e:
        print(f"server_overhead: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("server_overhead: interrupted", file=sys.stderr)
        return 130
    return 0 if report["ratio"] >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
