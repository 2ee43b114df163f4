"""vLLM's names of all-to-all libraries, as roles: what each stands for, and which backend plays it here.

Where the library is installed, the adapter of that name (nonet/moe/all2all); else ours of that role. Read by `resolve`.
Knows no tensors: whether a library is there is seen without importing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal


@dataclass(frozen=True)
class Role:
    what: str  # it stands for this exchange
    on_cuda: str  # our backend for that on GPUs of one NVLink domain
    library: str | None  # the module that its adapter needs; None: there is no adapter


ROLES = {
    "pplx": Role("within a node", "nvlink_low_latency", None),
    "deepep_high_throughput": Role("for prefill", "nvlink_high_throughput", "deep_ep"),
    "deepep_low_latency": Role("for decode", "nvlink_low_latency", "deep_ep"),
    "flashinfer_all2allv": Role("over NVLink between nodes", "nvlink_low_latency", "flashinfer"),
}
ON_CPU, WITHOUT_TRITON = "shm", "all2allv"
AMONG_GPUS = ("nvlink_low_latency", "nvlink_high_throughput", *(name for name, role in ROLES.items() if role.library))


def play(name: str, device: Literal["auto", "cpu", "cuda"]) -> str:
    """The backend that plays a role: the adapter of its name, or ours."""
    role = ROLES[name]
    if device != "cuda":
        return ON_CPU
    if role.library and find_spec(role.library):
        return name
    return role.on_cuda if find_spec("triton") else WITHOUT_TRITON
