"""The load balancer's YAML, TensorRT-LLM's: what each slot of each layer holds. Written by `nonet eplb plan`, served.

TensorRT-LLM refuses keys it does not know, so whatever else there is to say stands in comments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from nonet.config.load import validate
from nonet.config.schema import LoadBalancerConfig
from nonet.eplb.placement import Placement
from nonet.errors import ConfigError, nearest


def render(placement: Placement, layers: Sequence[int], updates: int = 0, comments: Sequence[str] = ()) -> str:
    """The file's text. `layers` are the model's indices; `updates`: layers rebalanced in one step, 0: static."""
    lines = [f"# {comment}" for comment in comments]
    lines.append("initial_global_assignments:")
    lines += [f"  {layer}: {row.tolist()}" for layer, row in zip(layers, placement.expert_LG, strict=True)]
    lines += [f"num_slots: {placement.fleet.num_slots}", f"layer_updates_per_iter: {updates}"]
    return "\n".join(lines) + "\n"


def read_assignments(path: Path, field: str) -> dict[int, list[int]]:
    """Model layer -> the expert in each slot. `field` is named where the file is none of these. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(field, str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(field, str(path), "must hold a mapping with initial_global_assignments")
    known = LoadBalancerConfig.model_fields
    unknown = next((str(key) for key in tree if key not in known), None)
    if unknown is not None:
        raise ConfigError(field, str(path), f"key {unknown!r} is unknown; {nearest(unknown, known)}")
    try:
        balancer = validate(LoadBalancerConfig, tree)
    except ConfigError as error:
        raise ConfigError(field, str(path), f"{error.field} = {error.value!r}: {error.remedy}") from error
    if not balancer.initial_global_assignments:
        raise ConfigError(field, str(path), "holds no initial_global_assignments")
    return balancer.initial_global_assignments
