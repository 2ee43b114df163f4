"""The whole engine against transformers by the equality rule, over layouts, all-to-alls and models.

Every case runs with a token budget that chunks prompts, few enough blocks that sequences are preempted, and a second
round whose prompts start with what the first round computed.
"""

from __future__ import annotations

import itertools

import pytest
from oracle import MODELS, folder, prompts, reference

from nonet import LLM, SamplingParams
from nonet.testing.equality import check_equality

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 4)]  # (TP, DP)
BACKENDS = ["naive", "allgather_reducescatter", "all2allv", "shm", "off"]
BUDGET = 24
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def cases():
    """Every layout with every backend, the model in turn; the other models only with --full."""
    names = itertools.cycle(MODELS)
    for (layout, backend), first in zip(itertools.product(LAYOUTS, BACKENDS), names, strict=False):
        for name in MODELS:
            marks = [] if name == first else [pytest.mark.slow]
            yield pytest.param(layout, backend, name, id=f"tp{layout[0]}dp{layout[1]}-{backend}-{name}", marks=marks)
    for name in MODELS:
        yield pytest.param((1, 1), "off", name, id=f"tp1dp1-local-{name}")


@pytest.mark.parametrize(("layout", "backend", "name"), list(cases()))
def test_tokens_equal_transformers(layout, backend, name):
    tp, dp = layout
    path = folder(name)
    vocabulary = int(MODELS[name]["vocab_size"])
    settings = {} if backend == "off" else {"enable_expert_parallel": True, "all2all_backend": backend}
    with LLM(
        path, tensor_parallel_size=tp, data_parallel_size=dp, block_size=8, num_blocks=24,
        max_num_batched_tokens=BUDGET, max_num_seqs=6, **settings,
    ) as llm:  # fmt: skip
        first = prompts(vocabulary, [1, 3, 17, 40, 70, 33, 64, 9] * (1 + (dp > 1)))
        outs = llm.generate(first, GREEDY)
        found = check_equality(reference(path), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outs])
        stats = llm.client.stats()
        computed = sum(s.tokens for s in stats[::tp])
        assert all(s.max_step_tokens <= BUDGET for s in stats)
        assert sum(s.preemptions for s in stats) > 0
        assert all(s.free_blocks == s.num_blocks for s in stats)
        again = outs[4].prompt_token_ids + outs[4].outputs[0].token_ids
        second = [llm.generate([again], GREEDY)[0] for _ in range(1 + dp)]  # at least one rank sees it twice
        found_again = check_equality(reference(path), [(o.prompt_token_ids, o.outputs[0].token_ids) for o in second])
        fed = len(second) * (len(again) + GREEDY.max_tokens - 1)  # the last output is never fed back
        hits = sum(o.num_cached_tokens for o in second)
        assert hits >= len(again) // 8 * 8
        assert sum(s.tokens for s in llm.client.stats()[::tp]) - computed == fed - hits
    print(f"{found}; {found_again}")
