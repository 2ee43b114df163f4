"""Draws the next token of each sequence from its logits, and reports log probabilities.

Run by the first rank of each data-parallel group. A sequence's random numbers depend on its seed and position only.
Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nonet.engine.messages import TokenLogprob
from nonet.engine.structured import Grammars
from nonet.kernels import cpu
from nonet.kernels import triton as gpu
from nonet.schedule.sequence import Sequence

_MASK = (1 << 64) - 1


class Sampler:
    """Knows the end-of-sequence tokens; keeps nothing between steps that sequences do not say themselves, but threads
    that make noise for GPUs."""

    def __init__(self, eos_token_ids: Seq[int], tokenizer_folder: str = "") -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self.threads = ThreadPoolExecutor(thread_name_prefix="noise")  # none starts before it has to
        self.grammars = Grammars(tokenizer_folder, eos_token_ids)

    def sample(self, logits_BV: Tensor, sequences: Seq[Sequence]) -> list[int]:
        """One token for each row; row b belongs to `sequences[b]`."""
        adjusted = [b for b, sequence in enumerate(sequences) if self._adjusts(sequence)]
        drawn = [b for b, sequence in enumerate(sequences) if not sequence.params.greedy]
        if adjusted:
            logits_BV = logits_BV.to(torch.float32, copy=True)
            for b in adjusted:
                self._adjust(logits_BV[b], sequences[b])
        tokens = largest(logits_BV) if len(drawn) < len(sequences) else [0] * len(sequences)
        if drawn and gpu.handles(logits_BV):
            found = draw_rows(logits_BV, drawn, [sequences[b] for b in drawn], self.threads)
        else:
            found = [draw(logits_BV[b].float(), sequences[b]) for b in drawn]
        for b, token in zip(drawn, found, strict=True):
            tokens[b] = token
        return tokens

    def _adjusts(self, sequence: Sequence) -> bool:
        p = sequence.params
        return bool(
            p.presence_penalty
            or p.frequency_penalty
            or p.repetition_penalty != 1.0
            or sequence.num_output < p.min_tokens
            or p.logit_bias
            or p.structured_outputs
        )

    def _adjust(self, logits_V: Tensor, sequence: Sequence) -> None:
        """Penalties (OpenAI's two over the output; repetition over prompt and output, Keskar 2019), biases, bars."""
        p = sequence.params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sequence.tokens, device=logits_V.device).unique()
            value = logits_V[seen]
            logits_V[seen] = torch.where(value > 0, value / p.repetition_penalty, value * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and sequence.num_output:
            token, count = torch.tensor(sequence.outputs, device=logits_V.device).unique(return_counts=True)
            logits_V[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in (p.logit_bias or {}).items():
            if token < len(logits_V):
                logits_V[token] += bias
        if p.structured_outputs:
            barred_V = torch.from_numpy(self.grammars.forbidden(sequence, len(logits_V)))
            logits_V[barred_V.to(logits_V.device)] = float("-inf")
        if sequence.num_output < p.min_tokens:
            ending = {*self.eos_token_ids, *p.stop_token_ids}
            logits_V[[token for token in ending if token < len(logits_V)]] = float("-inf")


def largest(logits_BV: Tensor) -> list[int]:
    """The most likely token of each row, the first of equal ones."""
    if cpu.handles(logits_BV):
        from nonet.kernels.cpu import rows

        return rows.argmax(logits_BV.contiguous())
    if gpu.handles(logits_BV):
        from nonet.kernels.triton import sampling

        return sampling.argmax(logits_BV).tolist()
    return logits_BV.float().argmax(dim=-1).tolist()


def draw_rows(logits_BV: Tensor, rows: Seq[int], sequences: Seq[Sequence], threads: ThreadPoolExecutor) -> list[int]:
    """`draw` for these rows and their sequences, all at once on a GPU. Noise is made on the CPU, as everywhere."""
    from nonet.kernels.cpu.noise import exponential
    from nonet.kernels.triton import sampling

    noise_NV = torch.empty((len(rows), logits_BV.shape[1]), pin_memory=True)
    list(threads.map(lambda row, sequence: exponential(_key(sequence), row), noise_NV, sequences))
    given = row_N, setting_4N = torch.tensor(rows), settings(sequences)
    row_N, setting_4N = (part.pin_memory().to(logits_BV.device, non_blocking=True) for part in given)
    return sampling.draw(logits_BV, row_N, setting_4N, noise_NV.to(logits_BV.device, non_blocking=True)).tolist()


def settings(sequences: Seq[Sequence]) -> Tensor:
    """float32 [4, N]: temperature, logarithm of min_p, top_k, top_p, as `kernels.triton.sampling.draw` takes them."""
    each = [sequence.params for sequence in sequences]
    table = torch.tensor([[p.temperature, p.min_p, p.top_k, p.top_p] for p in each]).t().contiguous()
    table[1].log_()
    return table


def draw(logits_V: Tensor, sequence: Sequence) -> int:
    """One token by temperature, min_p, top_k, top_p; the largest probability / exponential noise wins."""
    from nonet.kernels.cpu.noise import exponential

    p = sequence.params
    logits_V = logits_V / p.temperature
    if p.min_p > 0:
        floor = logits_V.max() + torch.log(torch.tensor(p.min_p))
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    if 0 < p.top_k < len(logits_V):
        lowest = torch.topk(logits_V, p.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest, float("-inf"))
    probability_V = torch.softmax(logits_V, dim=-1)
    if p.top_p < 1.0:
        ordered, index = probability_V.sort(descending=True, stable=True)
        out = ordered.cumsum(0) - ordered >= p.top_p  # the first to reach top_p stays
        probability_V = probability_V.index_fill(0, index[out], 0.0)
    noise_V = exponential(_key(sequence), torch.empty(len(probability_V)))
    return int((probability_V / noise_V.to(probability_V.device)).argmax())


def _key(sequence: Sequence) -> int:
    """64 bits for the random numbers of this sequence at this position."""
    mixed = (sequence.seed * 0x9E3779B97F4A7C15 + len(sequence.tokens) * 0xBF58476D1CE4E5B9 + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 29)


def logprobs(logits_BV: Tensor, tokens: Seq[int], counts: Seq[int]) -> list[list[TokenLogprob]]:
    """For each row its token's log probability and rank, then the `counts[b]` most likely, before any adjustment."""
    table = torch.log_softmax(logits_BV.float(), dim=-1)
    value_B1 = table.gather(1, torch.tensor(tokens, dtype=torch.int64, device=table.device).unsqueeze(1))
    rank_B = (table > value_B1).sum(dim=1) + 1
    own = zip(tokens, value_B1.squeeze(1).tolist(), rank_B.tolist(), strict=True)
    out: list[list[TokenLogprob]] = [[entry] for entry in own]
    for count in set(counts) - {0}:  # rows that want as many together, so that others change nothing about equal ones
        rows = [b for b, wanted in enumerate(counts) if wanted == count]
        best = torch.topk(table[rows], min(count, table.shape[1]))
        for b, tops, values in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
            pairs = enumerate(zip(tops, values, strict=True), 1)
            out[b].extend((i, v, rank) for rank, (i, v) in pairs if i != tokens[b])
    return out
