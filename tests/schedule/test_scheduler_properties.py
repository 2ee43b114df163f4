"""Random lives of the scheduler: arrivals, early ends, aborts and far too few blocks, in any order.

All promises are checked by the pretend engine at every step; here are only the ways to provoke it.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from schedule_oracle import PretendEngine

from nonet.errors import CapacityError, RequestError

RELAXED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
tokens = st.integers(0, 2)  # few, so that prefixes meet
prompts = st.lists(tokens, min_size=1, max_size=14)
stems = st.sampled_from([[], [0] * 4, [0, 1] * 4, [2, 1, 0] * 4])


@st.composite
def engines(draw) -> PretendEngine:
    max_num_seqs = draw(st.integers(1, 5))
    return PretendEngine(
        num_blocks=draw(st.integers(1, 12)),
        block_size=draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + draw(st.integers(0, 12)),
        max_model_len=draw(st.integers(2, 40)),
        prefix_caching=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def fits(engine: PretendEngine, prompt: list[int], max_tokens: int) -> bool:
    room = engine.blocks.num_blocks * engine.blocks.block_size
    return len(prompt) < engine.scheduler.max_model_len and len(prompt) + max_tokens - 1 <= room


def add(engine: PretendEngine, prompt: list[int], max_tokens: int, target: int, prompt_logprobs: int | None) -> None:
    """Add, or see it refused and not kept."""
    if fits(engine, prompt, max_tokens):
        engine.add(prompt, max_tokens, target, prompt_logprobs)
        return
    before = len(engine.scheduler.waiting)
    with pytest.raises((RequestError, CapacityError)):
        engine.add(prompt, max_tokens, target, prompt_logprobs)
    assert len(engine.scheduler.waiting) == before


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(engine=engines())
    def start(self, engine: PretendEngine) -> None:
        self.engine = engine

    @rule(
        stem=stems,
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        outputs=st.integers(1, 12),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def arrive(self, stem, prompt, max_tokens, outputs, prompt_logprobs) -> None:
        add(self.engine, stem + prompt, max_tokens, outputs, prompt_logprobs)

    @precondition(lambda self: self.engine.watched)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.engine.watched)
    @rule(data=st.data())
    def abort(self, data) -> None:
        assert self.engine.abort(data.draw(st.sampled_from(list(self.engine.watched))))

    @precondition(lambda self: self.engine.finished)
    @rule(data=st.data())
    def abort_too_late(self, data) -> None:
        assert not self.engine.abort(data.draw(st.sampled_from(list(self.engine.finished))))

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_books()
            self.engine.findable()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=RELAXED
)
TestSchedulerMachine = SchedulerMachine.TestCase


@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
@given(
    engine=engines(),
    burst=st.lists(
        st.tuples(stems, prompts, st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, None, 1])), max_size=12
    ),
)
def test_a_burst_is_served_to_the_end(engine, burst):
    for stem, prompt, max_tokens, target, prompt_logprobs in burst:
        add(engine, stem + prompt, max_tokens, target, prompt_logprobs)
    wanted = {known.sequence.request_id: known.target for known in engine.watched.values()}
    engine.run()
    assert {name: sequence.num_output for name, sequence in engine.finished.items()} == wanted
    assert engine.scheduler.schedule() == []


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(prompt=st.lists(tokens, min_size=1, max_size=30), size=st.integers(1, 5), budget=st.integers(1, 9))
def test_what_was_computed_once_is_not_computed_again(prompt, size, budget):
    """With room for both, a second equal prompt computes fewer tokens by exactly the whole blocks before its last."""
    engine = PretendEngine(num_blocks=80, block_size=size, max_num_seqs=1, budget=budget)
    engine.add(prompt, max_tokens=1)
    engine.run()
    first = engine.computed_tokens
    assert first == len(prompt)
    again = engine.add(prompt, max_tokens=1)
    engine.run()
    hit = (len(prompt) - 1) // size * size
    assert again.num_cached == hit
    assert engine.computed_tokens - first == len(prompt) - hit
