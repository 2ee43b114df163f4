"""From what the scheduler chose to tensors, by one example worked out by hand, and the rows whose logits are taken."""

from __future__ import annotations

import pytest
import torch

from nonet.engine.batch import BatchBuilder, prompt_positions, step_batch
from nonet.engine.messages import StepBatch
from nonet.schedule.scheduler import Scheduled
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams

CPU = torch.device("cpu")


def sequence(tokens, blocks=(), num_prompt=0, **params) -> Sequence:
    made = Sequence("a", list(tokens), SamplingParams(**params), max_tokens=9, seed=0, num_prompt=num_prompt)
    made.blocks = list(blocks)
    return made


# The example: blocks of 4 tokens, of which 10 exist, so that the scratch block begins at place 40. Four sequences:
#   a  decodes its 6th token. Blocks 3, 1 hold places 12-15 and 4-7: positions 0-5 lie at 12 13 14 15 4 5.
#   b  computes its 3rd token. Block 7 holds places 28-31: positions 0-2 lie at 28 29 30.
#   c  computes positions 3-5. Blocks 2, 0 hold places 8-11 and 0-3: positions 0-5 lie at 8 9 10 11 0 1.
#   d  computes positions 0-1. Block 9 holds places 36-39.
# a and b have one new token each and stand first. b's context of 3 is padded to a's 6 and masked.
EXAMPLE = StepBatch(
    tokens=[15, 22, 33, 34, 35, 40, 41],
    starts=[5, 2, 3, 0],
    counts=[1, 1, 3, 2],
    blocks=[[3, 1], [7], [2, 0], [9]],
    logit_rows=[0, 1, 6],
)


def built(step: StepBatch = EXAMPLE, tokens=(7, 0, 3), tp_size: int = 2):
    return BatchBuilder(4, scratch_place=40, tp_size=tp_size, device=CPU).build(step, tokens)


def seen_by_decoding(attention) -> list[list[int]]:
    """The places that its blocks and length leave to each decoding sequence."""
    size = attention.block_size
    rows = zip(attention.decode_block_BN.tolist(), attention.decode_length_B.tolist(), strict=True)
    return [[blocks[c // size] * size + c % size for c in range(length)] for blocks, length in rows]


def test_tokens_positions_and_places_of_the_example():
    batch = built()
    assert batch.token_T.tolist() == [15, 22, 33, 34, 35, 40, 41]
    assert batch.position_T.tolist() == [5, 2, 3, 4, 5, 0, 1]
    assert batch.attention.place_T.tolist() == [5, 30, 11, 0, 1, 36, 37]
    assert batch.logit_row_B.tolist() == [0, 1, 6]
    assert {t.dtype for t in (batch.token_T, batch.position_T, batch.attention.place_T)} == {torch.int64}


def test_what_each_token_of_the_example_may_see():
    attention = built().attention
    assert attention.num_decode == 2
    assert attention.decode_block_BN.tolist() == [[3, 1], [7, 7]]
    assert seen_by_decoding(attention) == [[12, 13, 14, 15, 4, 5], [28, 29, 30]]
    assert [(p.first, p.count, p.place_C.tolist()) for p in attention.prefills] == [
        (2, 3, [8, 9, 10, 11, 0, 1]),
        (5, 2, [36, 37]),
    ]


def test_rows_of_the_ranks_in_the_example():
    """Seven tokens over two tensor-parallel ranks are 4 + 3; the other data-parallel ranks have 0 and 3."""
    batch = built()
    assert batch.tp_rows == (4, 3)
    assert batch.moe.rows == (4, 3, 0, 0, 2, 1)
    assert batch.moe.is_load


def test_blocks_held_beyond_the_context_are_not_read():
    step = StepBatch(tokens=[1, 2], starts=[0, 4], counts=[1, 1], blocks=[[5, 6], [7, 8, 9]], logit_rows=[])
    attention = built(step, [2], 1).attention
    assert attention.place_T.tolist() == [20, 32]
    assert seen_by_decoding(attention) == [[20], [28, 29, 30, 31, 32]]


def test_a_step_without_own_tokens_still_counts_the_others():
    batch = built(StepBatch(), [0, 5], 1)
    assert batch.token_T.shape == batch.position_T.shape == batch.attention.place_T.shape == (0,)
    assert (batch.attention.num_decode, batch.attention.prefills) == (0, ())
    assert batch.tp_rows == (0,)
    assert batch.moe.rows == (0, 5)
    assert batch.logit_row_B.shape == (0,)


def test_a_dummy_pass_touches_the_scratch_place_only_and_is_no_load():
    batch = BatchBuilder(4, scratch_place=40, tp_size=2, device=CPU).dummy(torch.tensor([3, 1, 4]), [3, 5])
    assert batch.token_T.tolist() == [3, 1, 4]
    assert batch.attention.place_T.tolist() == [40, 40, 40]
    assert batch.attention.decode_block_BN.tolist() == [[10], [10], [10]]
    assert batch.attention.decode_length_B.tolist() == [1, 1, 1]
    assert batch.attention.num_decode == 3
    assert batch.moe.rows == (2, 1, 3, 2)
    assert not batch.moe.is_load
    assert batch.logit_row_B.tolist() == []


def test_a_step_in_plain_numbers():
    decoding = sequence([1, 2, 3, 4], blocks=[4], num_prompt=2)
    chunk = sequence(range(10, 20), blocks=[2, 0])
    last = sequence([7, 8], blocks=[1])
    step = step_batch([Scheduled(decoding, 3, 1), Scheduled(chunk, 4, 3), Scheduled(last, 0, 2)])
    assert step == StepBatch(
        tokens=[4, 14, 15, 16, 7, 8],
        starts=[3, 4, 0],
        counts=[1, 3, 2],
        blocks=[[4], [2, 0], [1]],
        logit_rows=[0, 5],  # the chunk is not at its prompt's end
    )


def test_prompt_logprobs_want_every_row_but_the_last_and_the_last_to_sample():
    wanting = sequence([1, 2, 3, 4], prompt_logprobs=0)
    other = sequence([5, 6])
    assert step_batch([Scheduled(other, 0, 2), Scheduled(wanting, 0, 4)]).logit_rows == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("start", "count", "done", "positions"),
    [
        (0, 6, 0, range(0, 5)),  # the logits of position p tell the log probability of token p + 1
        (0, 3, 0, range(0, 3)),
        (3, 2, 3, range(3, 5)),
        (5, 1, 5, range(0)),  # the last prompt token's logits belong to the first output
        (0, 6, 3, range(3, 5)),  # preempted, and started over: those that went out are not wanted again
        (0, 2, 3, range(3, 2)),
        (0, 8, 0, range(0, 5)),  # two outputs are computed anew with the prompt: not part of it
    ],
)
def test_positions_whose_log_probability_is_owed(start, count, done, positions):
    wanting = sequence(range(8), num_prompt=6, prompt_logprobs=1)
    wanting.prompt_logprobs_done = done
    assert list(prompt_positions(Scheduled(wanting, start, count))) == list(positions)
    assert list(prompt_positions(Scheduled(sequence(range(8), num_prompt=6), start, count))) == []
