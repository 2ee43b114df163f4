"""Scheduling by hand: small cases whose every step can be foretold, and what is refused."""

from __future__ import annotations

import pytest
from schedule_oracle import PretendEngine

from nonet.errors import CapacityError, RequestError
from nonet.schedule.blocks import Blocks
from nonet.schedule.scheduler import Scheduler
from nonet.schedule.sequence import Sequence
from nonet.types import SamplingParams


def plan(items) -> list[tuple[str, int, int]]:
    return [(item.sequence.request_id, item.start, item.count) for item in items]


def test_a_long_prompt_is_chunked_by_the_budget():
    engine = PretendEngine(budget=6, block_size=4)
    engine.add(list(range(14)), max_tokens=3)
    assert [plan(engine.step()) for _ in range(5)] == [
        [("r0", 0, 6)],
        [("r0", 6, 6)],
        [("r0", 12, 2)],  # the last two, and the first token is drawn
        [("r0", 14, 1)],
        [("r0", 15, 1)],  # the third output needs no keys of its own
    ]
    assert not engine.scheduler.has_work


def test_samples_only_behind_the_last_known_token():
    engine = PretendEngine(budget=4)
    engine.add(list(range(6)))
    assert [[item.samples for item in engine.scheduler.schedule()]] == [[False]]
    engine = PretendEngine(budget=4)
    sequence = engine.add(list(range(6)))
    engine.step()
    assert sequence.num_output == 0
    engine.step()
    assert sequence.num_output == 1


def test_decoding_comes_before_prompts_and_the_rest_of_the_budget_goes_to_chunks():
    engine = PretendEngine(budget=6, num_blocks=20)
    engine.add([1, 2], max_tokens=8)
    assert plan(engine.step()) == [("r0", 0, 2)]
    engine.add(list(range(8)), max_tokens=2)
    engine.add([5, 5, 5], max_tokens=2)
    assert plan(engine.step()) == [("r0", 2, 1), ("r1", 0, 5)]
    assert plan(engine.step()) == [("r0", 3, 1), ("r1", 5, 3), ("r2", 0, 2)]
    assert plan(engine.step()) == [("r0", 4, 1), ("r1", 8, 1), ("r2", 2, 1)]


def test_a_chunk_of_one_token_stands_with_the_decoding_ones():
    engine = PretendEngine(budget=4, num_blocks=20)
    engine.add([1, 2, 3, 4, 5], max_tokens=2)
    assert plan(engine.step()) == [("r0", 0, 4)]
    engine.add([7, 7, 7], max_tokens=2)
    assert plan(engine.step()) == [("r0", 4, 1), ("r1", 0, 3)]


def test_no_more_sequences_than_the_limit():
    engine = PretendEngine(max_num_seqs=2, budget=16, num_blocks=20)
    for _ in range(3):
        engine.add([1, 2], max_tokens=2, target=1)
    assert plan(engine.step()) == [("r0", 0, 2), ("r1", 0, 2)]
    assert plan(engine.step()) == [("r2", 0, 2)], "both ended with their first token"


def test_a_prefix_hit_leaves_fewer_tokens_to_compute():
    engine = PretendEngine(block_size=4, num_blocks=20, prefix_caching=True)
    engine.add(list(range(11)), max_tokens=1)
    engine.run()
    again = engine.add(list(range(11)), max_tokens=1)
    assert plan(engine.step()) == [("r1", 8, 3)]
    assert again.num_cached == 8


def test_a_hit_counts_what_it_spares_against_the_budget():
    engine = PretendEngine(block_size=4, num_blocks=20, budget=8)
    engine.add(list(range(11)), max_tokens=1)
    engine.run()
    for _ in range(2):
        engine.add(list(range(11)), max_tokens=1)
    assert plan(engine.step()) == [("r1", 8, 3), ("r2", 8, 3)]


def test_prompt_logprobs_bypass_the_hit():
    engine = PretendEngine(block_size=4, num_blocks=20)
    engine.add(list(range(11)), max_tokens=1)
    engine.run()
    again = engine.add(list(range(11)), max_tokens=1, prompt_logprobs=2)
    assert plan(engine.step()) == [("r1", 0, 11)]
    assert again.num_cached == 0
    assert again.prompt_logprobs_done == 10


def test_the_youngest_is_preempted_and_starts_over_with_its_outputs():
    engine = PretendEngine(block_size=4, num_blocks=4, budget=16, prefix_caching=False)
    first = engine.add([1] * 6, max_tokens=8)
    second = engine.add([2] * 6, max_tokens=8)
    engine.step()  # two blocks each
    engine.step()
    engine.step()  # eight computed each, nine tokens: both want a third block
    assert (len(first.blocks), len(second.blocks), engine.blocks.num_free) == (2, 2, 0)
    assert plan(engine.step()) == [("r0", 8, 1)]
    assert (second.preemptions, second.blocks, second.num_computed, second.num_output) == (1, [], 0, 3)
    assert plan(engine.step()) == [("r0", 9, 1)], "no room: its nine tokens need three blocks, one is free"
    engine.run()
    assert (first.num_output, second.num_output) == (8, 8)
    assert engine.scheduler.num_preemptions == 1


def test_the_preempted_one_waits_in_front_of_later_arrivals():
    engine = PretendEngine(block_size=4, num_blocks=4, max_num_seqs=2)
    engine.add([1] * 6, max_tokens=8)
    second = engine.add([2] * 6, max_tokens=8)
    engine.add([3], max_tokens=1)
    for _ in range(4):
        engine.step()
    assert second.preemptions == 1
    assert [s.request_id for s in engine.scheduler.waiting] == ["r1", "r2"]
    engine.run()
    assert set(engine.finished) == {"r0", "r1", "r2"}


def test_who_waits_for_blocks_is_not_overtaken():
    engine = PretendEngine(block_size=4, num_blocks=3, budget=16)
    engine.add([1] * 8, max_tokens=4)
    engine.step()
    engine.add([2] * 8, max_tokens=1)  # needs two blocks, one is free
    engine.add([3], max_tokens=1)  # would fit
    steps = [plan(engine.step()) for _ in range(4)]
    assert [len(step) for step in steps] == [1, 1, 1, 2]
    assert sorted(steps[3]) == [("r1", 0, 8), ("r2", 0, 1)], "together, once the first is done"


@pytest.mark.parametrize("prompt", [[], [0] * 20, [0] * 25])
def test_a_prompt_out_of_bounds_is_refused_and_not_kept(prompt):
    engine = PretendEngine(max_model_len=20, num_blocks=20)
    with pytest.raises(RequestError, match="^prompt = "):
        engine.add(prompt, max_tokens=1)
    assert not engine.scheduler.has_work


def test_the_longest_prompt_is_served():
    engine = PretendEngine(max_model_len=20, num_blocks=20)
    engine.add([0] * 19, max_tokens=1)
    engine.run()
    assert list(engine.finished) == ["r0"]


def test_what_can_never_fit_is_refused_and_what_just_fits_is_served():
    engine = PretendEngine(num_blocks=2, block_size=4)
    with pytest.raises(CapacityError, match=r"prompt of 5 \+ max_tokens of 5 exceeds the KV cache of 8 tokens"):
        engine.add([0] * 5, max_tokens=5)
    assert not engine.scheduler.has_work
    engine.add([0] * 5, max_tokens=4)  # the last output needs no place
    engine.run()
    assert engine.finished["r0"].num_output == 4


def test_abort_frees_a_running_and_forgets_a_waiting_sequence():
    engine = PretendEngine(max_num_seqs=1, num_blocks=4)
    engine.add([1] * 6)
    engine.add([2] * 6)
    engine.step()
    assert engine.blocks.num_free == 2
    assert engine.abort("r1")
    assert engine.abort("r0")
    assert not engine.abort("r0")
    assert not engine.abort("never seen")
    assert engine.blocks.num_free == 4
    assert not engine.scheduler.has_work
    assert engine.scheduler.schedule() == []


def test_an_aborted_prefix_stays_findable():
    engine = PretendEngine(block_size=4, num_blocks=8)
    engine.add(list(range(9)))
    engine.step()
    engine.abort("r0")
    engine.add(list(range(9)))
    assert plan(engine.step()) == [("r1", 8, 1)]


def test_a_sequence_knows_its_outputs_and_what_it_owes():
    sequence = Sequence("a", [1, 2, 3], SamplingParams(prompt_logprobs=0), max_tokens=2, seed=0)
    sequence.tokens.append(9)
    assert (sequence.num_prompt, sequence.num_output, sequence.outputs) == (3, 1, [9])
    assert sequence.wants_prompt_logprobs
    sequence.prompt_logprobs_done = 2
    assert not sequence.wants_prompt_logprobs
    assert not Sequence("b", [1, 2], SamplingParams(), max_tokens=2, seed=0).wants_prompt_logprobs
    assert not Sequence("c", [1], SamplingParams(prompt_logprobs=1), max_tokens=2, seed=0).wants_prompt_logprobs


def test_an_idle_scheduler_has_nothing_to_run():
    scheduler = Scheduler(Blocks(4, 4, True), max_num_seqs=2, max_num_batched_tokens=8, max_model_len=16)
    assert not scheduler.has_work
    assert scheduler.schedule() == []
