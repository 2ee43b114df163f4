"""/metrics: the summed rows of `metrics`, and the ranks' own counters, in Prometheus's text form.

Used by `app`. vLLM's names where the meaning is the same, `nonet:` for what is ours. `engine` is a data-parallel rank,
`rank` one of all ranks. Legend: L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nonet.config.checkpoint import ModelSpec
from nonet.config.schema import EngineConfig
from nonet.engine.messages import Stats
from nonet.eplb.load import imbalance, rank_load
from nonet.eplb.placement import Placement
from nonet.server.metrics import COUNTERS, ENDED, HISTOGRAMS, PLACES, REASONS


class MetricsPage:
    """Renders for one model under one placement."""

    def __init__(self, model_name: str, config: EngineConfig, spec: ModelSpec) -> None:
        self._model = model_name
        self._whole_experts = config.parallel.enable_expert_parallel
        given, slots = config.moe.load_balancer.initial_global_assignments, config.moe.load_balancer.num_slots
        layers, experts, ranks = spec.moe_layers, spec.num_experts, config.world_size
        if given is not None and self._whole_experts:
            self._placement = Placement.from_assignments(given, layers, experts, slots or experts, ranks)
        else:
            self._placement = Placement.contiguous(len(layers), experts, ranks, slots or experts)
        self._layers = layers

    def render(self, row: Sequence[float], stats: Sequence[Stats], pending: Sequence[int]) -> bytes:
        """The page. `stats` of all ranks, none if the engine is dead; `pending` tokens by data-parallel rank."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Made([*self._own(row), *self._of_engines(stats, pending), *self._of_experts(stats)]))
        return generate_latest(registry)

    def _own(self, row: Sequence[float]) -> Iterator[Metric]:
        label, name = ["model_name"], [self._model]
        for counter, text in COUNTERS.items():
            count = CounterMetricFamily(counter, text, labels=label)
            count.add_metric(name, row[PLACES[counter]])
            yield count
        ended = CounterMetricFamily(ENDED, "Sequences that ended, by reason.", labels=[*label, "finished_reason"])
        for reason in REASONS:
            ended.add_metric([*name, reason], row[PLACES[f"{ENDED}/{reason}"]])
        yield ended
        for histogram, (bounds, text) in HISTOGRAMS.items():
            shown = HistogramMetricFamily(histogram, text, labels=label)
            place, size = PLACES[histogram], len(bounds) + 1
            ends = [*map(str, bounds), "+Inf"]
            below = np.cumsum(row[place : place + size]).tolist()
            shown.add_metric(name, list(zip(ends, below, strict=True)), row[place + size])
            yield shown

    def _of_engines(self, stats: Sequence[Stats], pending: Sequence[int]) -> Iterator[Metric]:
        """One line a data-parallel rank, as its first rank counts."""
        leaders = {one.dp_rank: one for one in reversed(stats)}
        gauges: dict[str, tuple[str, dict[int, float]]] = {
            "vllm:num_requests_running": (
                "Sequences at work: their prompt is being computed, or they decode.",
                {dp: one.running for dp, one in leaders.items()},
            ),
            "vllm:num_requests_waiting": (
                "Sequences that wait for room.",
                {dp: one.waiting for dp, one in leaders.items()},
            ),
            "vllm:kv_cache_usage_perc": (
                "Share of the KV cache in use, 0 to 1.",
                {dp: 1 - one.free_blocks / one.num_blocks for dp, one in leaders.items()},
            ),
            "nonet:pending_tokens": ("Tokens sent to the ranks and not yet back.", dict(enumerate(pending))),
        }
        counters: dict[str, tuple[str, dict[int, float]]] = {
            "vllm:num_preemptions": (
                "Sequences that lost their blocks and started over.",
                {dp: one.preemptions for dp, one in leaders.items()},
            ),
            "nonet:tokens": ("Tokens run through the model.", {dp: one.tokens for dp, one in leaders.items()}),
            "nonet:steps": ("Steps of the engine.", {dp: one.steps for dp, one in leaders.items()}),
        }
        for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, values) in families.items():
                family = kind(name, text, labels=["model_name", "engine"])
                for dp_rank, value in sorted(values.items()):
                    family.add_metric([self._model, str(dp_rank)], value)
                yield family

    def _of_experts(self, stats: Sequence[Stats]) -> Iterator[Metric]:
        """Only where ranks hold whole experts; without, every rank has its slice of all."""
        if not stats or not self._whole_experts:
            return
        load_LE = np.asarray([one.load for one in stats], dtype=np.int64).sum(axis=0)
        load_LR = rank_load(load_LE, self._placement)
        tokens = CounterMetricFamily(
            "nonet:expert_tokens", "Tokens routed to experts of a rank.", labels=["model_name", "layer", "rank"]
        )
        uneven = GaugeMetricFamily(
            "nonet:expert_imbalance", "(max - mean) / mean of tokens over ranks.", labels=["model_name", "layer"]
        )
        for layer, per_rank, value in zip(self._layers, load_LR.tolist(), imbalance(load_LR).tolist(), strict=True):
            uneven.add_metric([self._model, str(layer)], value)
            for rank, count in enumerate(per_rank):
                tokens.add_metric([self._model, str(layer), str(rank)], count)
        yield tokens
        yield uneven


class _Made(Collector):
    """A collector of metrics that are made already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics
