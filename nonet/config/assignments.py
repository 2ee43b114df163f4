"""Checks `initial_global_assignments`, the balancer's key for which expert each slot of each layer holds.

Used by `resolve`, so that a mistake is told before any rank starts, and by whoever makes a placement of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nonet.errors import ConfigError

FIELD = "initial_global_assignments"


def check_assignments(
    assignments: Mapping[int, Sequence[int]], moe_layers: Sequence[int], num_experts: int, num_slots: int
) -> list[list[int]]:
    """The experts of each of `moe_layers`, in that order. Raises ConfigError: a layer or an expert is missing or
    unknown, or a list has another length than there are slots."""
    for layer in assignments:
        if layer not in moe_layers:
            raise ConfigError(FIELD, layer, f"layer {layer} holds no experts; these do: {list(moe_layers)}")
    rows = []
    for layer in moe_layers:
        if layer not in assignments:
            raise ConfigError(FIELD, sorted(assignments), f"layer {layer} is missing; give every MoE layer")
        row = list(assignments[layer])
        if len(row) != num_slots:
            raise ConfigError(FIELD, len(row), f"layer {layer} must name an expert for each of {num_slots} slots")
        unknown = [e for e in row if not 0 <= e < num_experts]
        if unknown:
            raise ConfigError(FIELD, unknown[0], f"layer {layer}: experts are 0 to {num_experts - 1}")
        lost = sorted(set(range(num_experts)) - set(row))
        if lost:
            raise ConfigError(FIELD, lost[0], f"layer {layer}: this expert has no slot; every expert needs one")
        rows.append(row)
    return rows
