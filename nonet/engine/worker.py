"""One rank's tensors: the loaded model, its KV cache, and running a step through them.

Owned by the rank's loop (`core`); knows nothing of requests or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nonet import plugins
from nonet.comm.world import World
from nonet.config.checkpoint import ModelSpec
from nonet.config.fleet import Fleet
from nonet.config.resolve import block_bytes, cached_parts
from nonet.config.schema import EngineConfig
from nonet.engine.batch import BatchBuilder
from nonet.engine.messages import StepBatch
from nonet.engine.statistics import Recorder
from nonet.eplb.placement import Placement
from nonet.errors import CapacityError
from nonet.layers.attention import KvCache
from nonet.layers.attention_flashinfer import FlashInfer
from nonet.models.base import Parts, family_of
from nonet.moe.base import All2AllSpec
from nonet.moe.load import LoadCounter
from nonet.moe.waterfill import lookups
from nonet.weights.loader import Checkpoint
from nonet.weights.progress import LoadingBar


def placement_of(config: EngineConfig, spec: ModelSpec) -> Placement:
    """The static placement that the configuration asks for. Raises ConfigError."""
    balancer, ranks = config.moe.load_balancer, config.world_size
    slots = balancer.num_slots or spec.num_experts
    if balancer.initial_global_assignments is not None:
        given = balancer.initial_global_assignments
        return Placement.from_assignments(given, spec.moe_layers, spec.num_experts, slots, ranks)
    return Placement.contiguous(len(spec.moe_layers), spec.num_experts, ranks, slots)


class Worker:
    """Loads this rank's part of the model and runs steps."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, world: World) -> None:
        self.config, self.spec, self.world = config, spec, world
        self.dtype = getattr(torch, config.model.dtype)
        tp = world.tp.size
        self.placement = placement_of(config, spec)
        self.load = LoadCounter(len(spec.moe_layers), spec.num_experts, world.device)
        self._told_LE = np.zeros(self.load.count_LE.shape, dtype=np.int64)
        self.recorder = Recorder(config, spec, world, self.placement, self.load)
        most = -(-config.schedule.max_num_batched_tokens // tp)
        chunk = config.moe.max_num_tokens
        max_rows = most if chunk is None else min(most, max(1, chunk // world.size))
        fleet = self.placement.fleet
        if config.moe.all2all_backend == "tensor":
            fleet = Fleet.even(world.size, spec.num_experts)
        all2all = plugins.load("nonet.moe.all2all", config.moe.all2all_backend, "all2all_backend")
        experts = plugins.load("nonet.moe.experts", config.moe.expert_backend, "expert_backend")
        self.all2all = all2all.create(
            All2AllSpec(
                world.ep,
                fleet,
                spec.top_k,
                spec.hidden_size,
                self.dtype,
                max_rows,
                exact=config.moe.combine == "exact",
                fp8=config.moe.fp8_dispatch,
            )
        )
        rule = config.moe.load_balancer.replica_dispatch
        self.lookups = lookups(rule, self.placement, world.rank, world.device, self.all2all)
        with LoadingBar(spec.num_layers, wanted=world.rank == 0) as bar:
            checkpoint = Checkpoint(spec.folder, self.dtype, world.device, watch=bar)
            self.model = family_of(spec).Model(
                Parts(
                    spec=spec,
                    config=config,
                    checkpoint=checkpoint,
                    tp=world.tp,
                    ep=world.ep,
                    placement=self.placement,
                    all2all=self.all2all,
                    experts=experts.create(),
                    load=self.load,
                    lookups=self.lookups,
                    max_rows=max_rows,
                    dtype=self.dtype,
                    device=world.device,
                )
            )
            bar.done(checkpoint)
        self.bytes_read = checkpoint.bytes_read
        checkpoint.close()
        attention, block_size, flashinfer = config.model.attention_backend, config.cache.block_size, None
        if attention == "flashinfer":  # before the cache gets the memory that is left
            flashinfer = FlashInfer(block_size, world.device)
            flashinfer.prepare([layer.attention for layer in self.model.layers], self.dtype)
        self.num_blocks = self._count_blocks()
        self.cache = self._allocate_cache()
        scratch_place = self.num_blocks * block_size
        self.builder = BatchBuilder(block_size, scratch_place, tp, world.device, attention, flashinfer)
        self.steps = 0

    def _count_blocks(self) -> int:
        """Settled by the configuration, or on a GPU by the memory that is left; the least over all ranks."""
        if self.config.cache.num_blocks is not None:
            return self.config.cache.num_blocks
        cache = self.config.cache
        free, total = torch.cuda.mem_get_info(self.world.device)
        if cache.kv_cache_free_gpu_memory_fraction is not None:
            room = int(free * cache.kv_cache_free_gpu_memory_fraction)
        else:
            room = int(total * cache.gpu_memory_utilization) - (total - free)
        count = min(self.world.ep.all_gather_object(room // block_bytes(self.config, self.spec) - 1))
        if count < 1:
            raise CapacityError(
                f"no room for the KV cache: {free >> 20} of {total >> 20} MiB free after loading; "
                f"raise gpu_memory_utilization or use more ranks"
            )
        return count

    def _allocate_cache(self) -> list[KvCache]:
        """What each layer caches, keys and values mostly, with one scratch block behind the last."""
        places = (self.num_blocks + 1) * self.config.cache.block_size
        shapes = [(places, *part) for part in cached_parts(self.config, self.spec)]
        return [
            tuple(_zeros(shape, self.dtype, self.world.device) for shape in shapes)
            for _ in range(self.model.num_layers)
        ]

    @torch.inference_mode()
    def run(self, step: StepBatch, tokens_by_dp_rank: Sequence[int]) -> Tensor:
        """Run a step with all ranks; [B, V] logits of the rows asked for, on every tensor-parallel rank."""
        self.steps += 1
        batch = self.builder.build(step, tokens_by_dp_rank)
        hidden_BD = self.model.forward(batch, self.cache)
        self.recorder.end_iteration()
        if not step.logit_rows:
            return hidden_BD
        return self.model.logits(hidden_BD)

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int, tokens_by_dp_rank: Sequence[int]) -> None:
        """Random tokens through the model, the same on the ranks of a tensor-parallel group."""
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps * self.world.dp_size + self.world.dp_rank)
        token_D = torch.randint(self.spec.vocab_size, (num_tokens,), generator=generator)
        self.model.forward(self.builder.dummy(token_D, tokens_by_dp_rank), self.cache)
        self.recorder.end_iteration()

    def news_of_load(self) -> bytes:
        """What this rank's tokens chose since the last call, for `learn` on all ranks; empty if no rule follows it."""
        if not self.lookups.learns:
            return b""
        now_LE = self.load.count_LE.cpu().numpy()
        news_LE = now_LE - self._told_LE
        self._told_LE = now_LE.copy()
        return news_LE.tobytes()

    def reset_load(self) -> None:
        """Count from zero again; what was not told yet still will be."""
        self._told_LE -= self.load.count_LE.cpu().numpy()
        self.load.count_LE.zero_()

    def learn(self, news: Sequence[bytes]) -> None:
        """Everyone's news of one step."""
        shape = self._told_LE.shape
        self.lookups.learn(np.stack([np.frombuffer(part, dtype=np.int64).reshape(shape) for part in news]).sum(axis=0))

    def close(self) -> None:
        self.recorder.close()
        self.all2all.close()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPUs of memory that the system hands out only when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
