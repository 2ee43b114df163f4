"""What every model family offers, what it is built from, and how a checkpoint finds its family.

Used by the engine's worker. Legend: T tokens of this data-parallel rank, D hidden, B rows that want logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from nonet import plugins
from nonet.comm.group import Group
from nonet.config.checkpoint import ModelSpec
from nonet.config.fleet import split_evenly
from nonet.config.schema import EngineConfig
from nonet.eplb.placement import Placement
from nonet.errors import ModelError
from nonet.layers.attention import AttentionBatch, KvCache
from nonet.moe.base import All2All, Experts
from nonet.moe.layer import MoeBatch
from nonet.moe.load import LoadCounter
from nonet.moe.lookup import Lookups
from nonet.weights.loader import Checkpoint


@dataclass(frozen=True)
class Parts:
    """What a model is built from: its shape, its rank's groups, and the components that all its layers share."""

    spec: ModelSpec
    config: EngineConfig
    checkpoint: Checkpoint
    tp: Group
    ep: Group
    placement: Placement
    all2all: All2All
    experts: Experts
    load: LoadCounter
    lookups: Lookups
    max_rows: int  # tokens of one rank in one MoE pass
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input on one rank. `tp_rows` splits the T tokens over the tensor-parallel ranks."""

    token_T: Tensor
    position_T: Tensor
    attention: AttentionBatch
    tp_rows: tuple[int, ...]
    moe: MoeBatch
    logit_row_B: Tensor  # int64: tokens whose logits are wanted


class Model(Protocol):
    """A loaded model. Every rank calls forward in the same steps, also without tokens."""

    num_layers: int  # entries of the KV cache
    layers: Sequence[Any]  # each has its `attention`

    def forward(self, batch: Batch, cache: Sequence[KvCache]) -> Tensor:
        """Hidden states after the last norm of the rows `logit_row_B`: [B, D] on every tensor-parallel rank."""
        ...

    def logits(self, x_BD: Tensor) -> Tensor:
        """[B, vocabulary]; entered by all tensor-parallel ranks."""
        ...


def families() -> dict[str, ModuleType]:
    """The family files by name: those of this folder that say which architectures they serve."""
    modules = {name: importlib.import_module(f"nonet.models.{name}") for name in plugins.names("nonet.models")}
    return {name: module for name, module in modules.items() if hasattr(module, "ARCHITECTURES")}


def family_of(spec: ModelSpec) -> ModuleType:
    """The family that serves this architecture, once its `check`, if it has one, found nothing that is not done here.

    Raises ModelError, for an unknown architecture listing those that exist.
    """
    known = families().values()
    for module in known:
        if spec.architecture in module.ARCHITECTURES:
            if hasattr(module, "check"):
                module.check(spec)
            return module
    names = ", ".join(sorted(name for module in known for name in module.ARCHITECTURES))
    raise ModelError(f"architecture {spec.architecture} is not supported; supported: {names}")


def heads_of(count: int, tp: Group) -> tuple[int, int]:
    """First and last + 1 head of this rank; where there are fewer heads than ranks, neighbours hold the same one."""
    if count >= tp.size:
        own = count // tp.size
        return tp.rank * own, (tp.rank + 1) * own
    first = tp.rank * count // tp.size
    return first, first + 1


def ep_rows(tokens_by_dp_rank: Sequence[int], tp_size: int) -> tuple[int, ...]:
    """Tokens of every rank in the MoE layers: each data-parallel rank's, split over its tensor-parallel ranks."""
    return tuple(n for tokens in tokens_by_dp_rank for n in split_evenly(tokens, tp_size))
