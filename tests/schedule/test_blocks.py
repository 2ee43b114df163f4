"""The KV cache's books by hand: naming, sharing, taking and giving back blocks, and which cached one goes first."""

from __future__ import annotations

import pytest

from nonet.schedule.blocks import Blocks, block_hash
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams


def sequence(tokens: list[int], name: str = "a", **params) -> Sequence:
    return Sequence(name, list(tokens), SamplingParams(**params), max_tokens=4, seed=0)


def compute(blocks: Blocks, seq: Sequence, count: int | None = None) -> None:
    """Give the sequence blocks for its first tokens, and say they are computed."""
    count = len(seq.tokens) if count is None else count
    assert blocks.grow(seq, count)
    seq.num_computed = count
    blocks.commit(seq)


def run_and_release(blocks: Blocks, tokens: list[int]) -> list[int]:
    """A sequence that came and went; the blocks it had."""
    seq = sequence(tokens)
    compute(blocks, seq)
    held = list(seq.blocks)
    blocks.release(seq)
    return held


def test_a_hash_names_the_tokens_and_all_before_them():
    first, other = block_hash(b"", [1, 2]), block_hash(b"", [1, 3])
    assert first == block_hash(b"", (1, 2))
    names = {first, other, block_hash(first, [1, 2]), block_hash(other, [1, 2]), block_hash(b"", [2, 1])}
    assert len(names) == 5
    assert block_hash(b"", [258]) != block_hash(b"", [2, 1]), "ids are told apart, not their bytes"


@pytest.mark.parametrize(
    ("held", "tokens", "needed"), [(0, 1, 1), (0, 4, 1), (0, 5, 2), (1, 4, 0), (1, 5, 1), (2, 3, 0)]
)
def test_needed(held, tokens, needed):
    blocks, seq = Blocks(8, 4, True), sequence([0] * 20)
    assert blocks.grow(seq, held * 4)
    assert len(seq.blocks) == held
    assert blocks.needed(seq, tokens) == needed


def test_grow_takes_all_or_nothing():
    blocks, seq = Blocks(3, 4, True), sequence([0] * 20)
    assert blocks.grow(seq, 5)
    assert (len(seq.blocks), blocks.num_free) == (2, 1)
    assert not blocks.grow(seq, 13), "two more are needed, one is free"
    assert (len(seq.blocks), blocks.num_free) == (2, 1)
    assert blocks.grow(seq, 12)
    assert sorted(seq.blocks) == [0, 1, 2]
    blocks.release(seq)
    assert (seq.blocks, seq.num_computed, blocks.num_free) == ([], 0, 3)


def test_a_finished_prefix_is_found_but_never_the_last_token():
    blocks = Blocks(8, 4, True)
    held = run_and_release(blocks, list(range(10)))  # two full blocks and a half
    assert blocks.cached_prefix(sequence(list(range(10)))) == held[:2]
    assert blocks.cached_prefix(sequence(list(range(9)))) == held[:2]
    assert blocks.cached_prefix(sequence(list(range(8)))) == held[:1], "of eight tokens the last is computed anew"
    assert blocks.cached_prefix(sequence(list(range(4)))) == []
    assert blocks.cached_prefix(sequence([0, 1, 2, 3, 9, 9, 9, 9, 9])) == held[:1]
    assert blocks.cached_prefix(sequence([9, 1, 2, 3, 4, 5, 6, 7, 8])) == [], "equal tokens behind another start"


def test_only_computed_blocks_are_found():
    blocks, seq = Blocks(8, 4, True), sequence(list(range(12)))
    assert blocks.grow(seq, 12)
    seq.num_computed = 7
    blocks.commit(seq)
    assert blocks.cached_prefix(sequence(list(range(12)), "b")) == seq.blocks[:1]
    seq.num_computed = 12
    blocks.commit(seq)
    assert blocks.cached_prefix(sequence(list(range(13)), "b")) == seq.blocks


def test_a_running_prefix_is_shared_and_outlives_its_first_owner():
    blocks, first = Blocks(4, 4, True), sequence(list(range(9)))
    compute(blocks, first)
    second = sequence(list(range(8)) + [7], "b")
    prefix = blocks.cached_prefix(second)
    assert blocks.num_takeable(prefix) == 1, "held by the first, they were not free anyway"
    blocks.admit(second, prefix)
    assert (second.blocks, second.num_computed, second.num_committed) == (first.blocks[:2], 8, 2)
    blocks.release(first)
    assert blocks.num_free == 2, "the shared two stay held"
    blocks.release(second)
    assert blocks.num_free == 4


def test_a_free_cached_block_counts_as_free_until_it_is_held():
    blocks = Blocks(3, 4, True)
    held = run_and_release(blocks, list(range(9)))
    assert blocks.num_free == 3
    again = sequence(list(range(9)))
    prefix = blocks.cached_prefix(again)
    assert (prefix, blocks.num_takeable(prefix)) == (held[:2], 1)
    blocks.admit(again, prefix)
    assert blocks.num_free == 1


def test_a_block_taken_for_something_else_is_not_found_any_more():
    blocks = Blocks(2, 4, True)
    run_and_release(blocks, list(range(8)))
    compute(blocks, sequence([9] * 8, "b"))
    assert blocks.cached_prefix(sequence(list(range(9)), "c")) == []


def test_the_oldest_cached_block_goes_first_and_tails_before_their_prefix():
    blocks = Blocks(5, 4, True)
    old = run_and_release(blocks, [1] * 8)  # two blocks
    new = run_and_release(blocks, [2] * 8)  # two more; the fifth was never used
    taker = sequence([3] * 20, "taker")
    taken = []
    for count in (4, 8, 12, 16, 20):
        assert blocks.grow(taker, count)
        taken.append(taker.blocks[-1])
    unused = ({0, 1, 2, 3, 4} - set(old) - set(new)).pop()
    assert taken == [unused, old[1], old[0], new[1], new[0]]


def test_a_block_without_a_name_is_taken_before_any_cached_one():
    blocks = Blocks(3, 4, True)
    cached = run_and_release(blocks, [1] * 4)
    half = sequence([2] * 6, "half")
    compute(blocks, half, 3)  # one block, not full
    nameless = half.blocks[0]
    full = sequence([4] * 4, "full")
    compute(blocks, full)
    blocks.release(full)
    blocks.release(half)
    taker = sequence([3] * 4, "taker")
    assert blocks.grow(taker, 4)
    assert taker.blocks == [nameless]
    assert blocks.cached_prefix(sequence([1] * 5, "c")) == cached


def test_a_second_block_of_equal_content_does_not_hide_the_first():
    blocks, first, second = Blocks(4, 4, True), sequence([1] * 5), sequence([1] * 5, "b")
    compute(blocks, first)
    compute(blocks, second)  # at the same time: neither found the other
    assert set(first.blocks).isdisjoint(second.blocks)
    blocks.release(second)
    assert blocks.cached_prefix(sequence([1] * 5, "c")) == first.blocks[:1]
    blocks.release(first)
    assert blocks.cached_prefix(sequence([1] * 5, "c")) != []
    assert blocks.num_free == 4


def test_outputs_are_cached_like_prompts():
    blocks, seq = Blocks(4, 4, True), sequence([1, 2, 3])
    compute(blocks, seq)
    for token in (4, 5, 6):
        seq.tokens.append(token)
        compute(blocks, seq)
    held = list(seq.blocks)
    blocks.release(seq)
    assert blocks.cached_prefix(sequence([1, 2, 3, 4, 5])) == held[:1]


def test_prompt_log_probabilities_owed_bypass_the_cache_until_they_are_out():
    blocks = Blocks(8, 4, True)
    held = run_and_release(blocks, list(range(9)))
    seq = sequence(list(range(9)), prompt_logprobs=0)
    assert blocks.cached_prefix(seq) == []
    seq.prompt_logprobs_done = 7
    assert blocks.cached_prefix(seq) == []
    seq.prompt_logprobs_done = 8  # all nine tokens but the first have theirs
    assert blocks.cached_prefix(seq) == held[:2]


def test_without_prefix_caching_nothing_is_ever_found():
    blocks = Blocks(4, 4, False)
    run_and_release(blocks, list(range(8)))
    assert blocks.cached_prefix(sequence(list(range(9)))) == []
    assert blocks._block_of == {}
