"""Turns what the scheduler chose into the tensors one step needs.

Used by the core (choosing logits) and the worker (building tensors). Legend: T new tokens, B decoding sequences,
P prompts, D tokens of a dummy pass, N blocks of the longest context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nonet.config.fleet import split_evenly
from nonet.engine.messages import StepBatch
from nonet.layers.attention import AttentionBatch, PlannedStep, Prefill, Prompts
from nonet.layers.attention_flashinfer import FlashInfer
from nonet.models.base import Batch, ep_rows
from nonet.moe.layer import MoeBatch
from nonet.schedule.scheduler import Scheduled


def step_batch(items: Sequence[Scheduled]) -> StepBatch:
    """The step in plain numbers. Logits are taken where a token is sampled or a prompt's log probability is owed."""
    batch = StepBatch()
    for item in items:
        sequence, start, end = item.sequence, item.start, item.start + item.count
        first = len(batch.tokens)
        batch.tokens.extend(sequence.tokens[start:end])
        batch.starts.append(start)
        batch.counts.append(item.count)
        batch.blocks.append(sequence.blocks)
        batch.logit_rows.extend(first + position - start for position in prompt_positions(item))
        if item.samples:
            batch.logit_rows.append(first + item.count - 1)
    return batch


def prompt_positions(item: Scheduled) -> range:
    """Positions of this step whose logits give a prompt token's log probability that is still owed."""
    sequence = item.sequence
    if not sequence.wants_prompt_logprobs:
        return range(0)
    end = min(item.start + item.count, sequence.num_prompt - 1)
    return range(max(item.start, sequence.prompt_logprobs_done), end)


class BatchBuilder:
    """Makes a `Batch` of a `StepBatch` on one rank."""

    def __init__(
        self,
        block_size: int,
        scratch_place: int,
        tp_size: int,
        device: torch.device,
        attention: str = "reference",
        flashinfer: FlashInfer | None = None,
    ) -> None:
        self.block_size, self.scratch_place, self.tp_size, self.device = block_size, scratch_place, tp_size, device
        self.attention = attention  # the configuration's `attention_backend`
        self.flashinfer = flashinfer  # attends if it is there; then nothing else is told of prompts
        self._offsets = np.arange(block_size, dtype=np.int64)

    def build(self, step: StepBatch, tokens_by_dp_rank: Sequence[int]) -> Batch:
        """`tokens_by_dp_rank` counts every data-parallel rank's tokens in this step."""
        counts, starts = np.array(step.counts, dtype=np.int64), np.array(step.starts, dtype=np.int64)
        num_decode = int(np.count_nonzero(counts == 1))  # they come first
        size, decoding = self.block_size, list(zip(step.blocks, step.starts, strict=True))[:num_decode]
        used = [blocks[: start // size + 1] for blocks, start in decoding]
        longest = max(map(len, used), default=0)
        table = [blocks + blocks[:1] * (longest - len(blocks)) for blocks in used]  # padding is its own, not others'
        last = [blocks[-1] * size + start % size for blocks, (_, start) in zip(used, decoding, strict=True)]
        chunks = list(zip(step.blocks, step.starts, step.counts, strict=True))[num_decode:]
        places = [self._places(blocks, start + count) for blocks, start, count in chunks]
        own = [place[start:] for place, (_, start, _) in zip(places, chunks, strict=True)]
        first = np.cumsum(counts) - counts
        spans = first[num_decode:], counts[num_decode:], (starts + counts)[num_decode:]
        prompts = self._prompts([blocks for blocks, _, _ in chunks], *spans)
        position_T = self._tensor(np.repeat(starts - first, counts) + np.arange(len(step.tokens)))
        attention = AttentionBatch(
            place_T=self._tensor(np.concatenate([np.array(last, dtype=np.int64), *own])),
            position_T=position_T,
            num_decode=num_decode,
            decode_block_BN=self._tensor(np.array(table, dtype=np.int64).reshape(num_decode, longest)),
            decode_length_B=self._tensor(starts[:num_decode] + 1),
            block_size=size,
            prefills=self._prefills(spans[0], spans[1], places, prompts),
            backend=self.attention,
            prompts=prompts,
            planned=self._planned(step.blocks, step.starts, step.counts, num_decode),
        )
        return Batch(
            token_T=self._tensor(np.array(step.tokens, dtype=np.int64)),
            position_T=position_T,
            attention=attention,
            tp_rows=split_evenly(len(step.tokens), self.tp_size),
            moe=MoeBatch(ep_rows(tokens_by_dp_rank, self.tp_size)),
            logit_row_B=self._tensor(np.array(step.logit_rows, dtype=np.int64)),
        )

    def dummy(self, token_D: torch.Tensor, tokens_by_dp_rank: Sequence[int]) -> Batch:
        """A pass of tokens that belong to no request: they travel, but are no load and leave no keys behind."""
        D = len(token_D)
        place_D = torch.full((D,), self.scratch_place, device=self.device)
        position_D = torch.zeros(D, dtype=torch.int64, device=self.device)
        return Batch(
            token_T=token_D.to(self.device),
            position_T=position_D,
            attention=AttentionBatch(
                place_T=place_D,
                position_T=position_D,
                num_decode=D,
                decode_block_BN=(place_D // self.block_size).unsqueeze(1),
                decode_length_B=torch.ones(D, dtype=torch.int64, device=self.device),
                block_size=self.block_size,
                prefills=(),
                backend=self.attention,
                planned=self._planned([[self.scratch_place // self.block_size]] * D, [0] * D, [1] * D, D),
            ),
            tp_rows=split_evenly(D, self.tp_size),
            moe=MoeBatch(ep_rows(tokens_by_dp_rank, self.tp_size), is_load=False),
            logit_row_B=torch.zeros(0, dtype=torch.int64, device=self.device),
        )

    def _planned(
        self, blocks: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], num_decode: int
    ) -> PlannedStep | None:
        return None if self.flashinfer is None else self.flashinfer.step(blocks, starts, counts, num_decode)

    def _prompts(
        self, blocks: Sequence[Sequence[int]], first_P: np.ndarray, count_P: np.ndarray, context_P: np.ndarray
    ) -> Prompts | None:
        """For the kernels that want it, in one transfer."""
        if self.attention != "triton" or not blocks:
            return None
        used = [own[: -(-context // self.block_size)] for own, context in zip(blocks, context_P, strict=True)]
        longest = max(map(len, used))
        table = [[*own, *[0] * (longest - len(own))] for own in used]
        rows = (first_P, count_P, context_P, np.cumsum(context_P) - context_P)
        whole = self._tensor(np.concatenate([np.stack(rows, axis=1), np.array(table, dtype=np.int64)], axis=1))
        block_PN = whole[:, 4:]
        offset = torch.arange(self.block_size, device=self.device)
        place_PC = (block_PN.unsqueeze(2) * self.block_size + offset).flatten(1)
        place_C = torch.cat([place[:context] for place, context in zip(place_PC, context_P.tolist(), strict=True)])
        pairs = int((count_P * context_P - count_P * (count_P - 1) // 2).sum())
        first, count, context, begin = whole[:, :4].t().contiguous().unbind()
        return Prompts(block_PN, first, count, context, begin, place_C, pairs)

    def _prefills(
        self, first_P: np.ndarray, count_P: np.ndarray, places: Sequence[np.ndarray], prompts: Prompts | None
    ) -> tuple[Prefill, ...]:
        """With the places of each prompt's context."""
        if self.flashinfer is not None:
            return ()
        if prompts is not None:
            on_device = prompts.place_C.split([len(place) for place in places])
        else:
            on_device = tuple(self._tensor(place) for place in places)
        rows = zip(first_P.tolist(), count_P.tolist(), on_device, strict=True)
        return tuple(Prefill(first, count, place) for first, count, place in rows)

    def _places(self, blocks: Sequence[int], length: int) -> np.ndarray:
        """Cache places of positions 0 .. length - 1."""
        used = np.array(blocks[: -(-length // self.block_size)], dtype=np.int64)
        return (used[:, None] * self.block_size + self._offsets).reshape(-1)[:length]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
