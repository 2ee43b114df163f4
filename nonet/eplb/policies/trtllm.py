"""TensorRT-LLM's planner: greedy replication, then the largest replica to the least loaded rank with a free slot.

For parity with its offline tool, in results and in ties (its moeLoadBalancer, doReplication and doPlacement).
It may put two replicas of an expert on one rank, knows no speeds, and plans afresh each time.
Legend: L MoE layers, E experts, R ranks, G global slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nonet.eplb.plan import Problem
from nonet.eplb.policies._jit import jit
from nonet.errors import ConfigError


def place(problem: Problem) -> npt.NDArray[np.int32]:
    """expert_LG. Raises ConfigError for dead ranks, unequal speeds and a cap on moves."""
    fleet = problem.fleet
    if problem.max_moves is not None:
        raise ConfigError("max_moves", problem.max_moves, "trtllm plans afresh and keeps no cap; use nonet")
    if fleet.dead_ranks or len(set(fleet.speeds)) > 1:
        raise ConfigError("policy", "trtllm", "knows no dead ranks and no speeds; use nonet")
    slots_R = np.array(fleet.slots_by_rank, dtype=np.int64)
    return np.stack([pack(load_E, replicate(load_E, fleet.num_slots), slots_R) for load_E in problem.load_LE])


@jit
def replicate(load_E: npt.NDArray[np.float64], num_slots: int) -> npt.NDArray[np.int64]:
    """count_E: replicas of each expert; one more to the largest load / replicas, ties to the higher expert."""
    num_experts = len(load_E)
    count_E = np.ones(num_experts, np.int64)
    if load_E.max() == 0:
        for g in range(num_experts, num_slots):
            count_E[g % num_experts] += 1
        return count_E
    for _ in range(num_experts, num_slots):
        best, most = 0, -1.0
        for e in range(num_experts):
            if load_E[e] / count_E[e] >= most:
                best, most = e, load_E[e] / count_E[e]
        count_E[best] += 1
    return count_E


@jit
def pack(
    load_E: npt.NDArray[np.float64], count_E: npt.NDArray[np.int64], slots_R: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """expert_G: replicas in falling order of load / replicas, each to the least loaded rank; ties to the lower."""
    first_R = np.cumsum(slots_R) - slots_R
    used_R = np.zeros(len(slots_R), np.int64)
    load_R = np.zeros(len(slots_R), np.float64)
    out_G = np.zeros(slots_R.sum(), np.int32)
    size_E = load_E / count_E
    for e in np.argsort(-size_E, kind="mergesort"):  # stable: ties to the lower expert
        for _ in range(count_E[e]):
            best = -1
            for r in range(len(slots_R)):
                if used_R[r] < slots_R[r] and (best < 0 or load_R[r] < load_R[best]):
                    best = r
            out_G[first_R[best] + used_R[best]] = e
            used_R[best] += 1
            load_R[best] += size_E[e]
    return out_G
