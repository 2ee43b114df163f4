"""Random mixes of decoding sequences and prompt chunks over scattered blocks, for tests of attention."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from nonet.engine.batch import BatchBuilder
from nonet.engine.messages import StepBatch
from nonet.layers.attention import AttentionBatch
from nonet.layers.attention_flashinfer import FlashInfer

CPU = torch.device("cpu")


@dataclass
class Paged:
    """Blocks handed out in random order, as a busy cache would have them."""

    num_blocks: int
    block_size: int
    seed: int = 0
    backend: str = "reference"
    device: torch.device = CPU
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = random.Random(self.seed).sample(range(self.num_blocks), self.num_blocks)
        flashinfer = FlashInfer(self.block_size, self.device) if self.backend == "flashinfer" else None
        scratch = self.num_blocks * self.block_size
        self.builder = BatchBuilder(self.block_size, scratch, 1, self.device, self.backend, flashinfer)

    @property
    def places(self) -> int:
        """Of the cache, the scratch block included."""
        return (self.num_blocks + 1) * self.block_size

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // self.block_size))]

    def positions(self, blocks: list[int], count: int) -> torch.Tensor:
        """Where positions 0 .. count - 1 of a sequence lie."""
        size = self.block_size
        return torch.tensor([blocks[p // size] * size + p % size for p in range(count)])

    def batch(self, spans: list[tuple[list[int], int, int]]):
        """The whole step's batch; a span is (blocks, first new position, new tokens), decoding ones first."""
        step = StepBatch(
            tokens=[0] * sum(count for _, _, count in spans),
            starts=[start for _, start, _ in spans],
            counts=[count for _, _, count in spans],
            blocks=[blocks for blocks, _, _ in spans],
        )
        return self.builder.build(step, [len(step.tokens)])

    def attention(self, spans: list[tuple[list[int], int, int]]) -> AttentionBatch:
        return self.batch(spans).attention


def random_spans(paged: Paged, seed: int, max_len: int) -> list[tuple[list[int], int, int]]:
    """Up to four decoding sequences, then up to three chunks, some at the start of their prompt."""
    pick = random.Random(seed)
    spans = []
    for _ in range(pick.randint(0, 4)):
        length = pick.randint(1, max_len)
        spans.append((paged.take(length), length - 1, 1))
    for _ in range(pick.randint(0 if spans else 1, 3)):
        count = pick.randint(2, max_len)
        start = pick.choice([0, pick.randint(0, max_len - count)])
        spans.append((paged.take(start + count), start, count))
    return spans
