"""Made-up loads: shares sum to one, seeds repeat, and each name has the skew that it promises."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from nonet.eplb import synthetic
from nonet.errors import ConfigError


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_shares(name):
    share_LE = synthetic.popularity(name, 3, 64, 7)
    assert share_LE.shape == (3, 64)
    np.testing.assert_allclose(share_LE.sum(axis=1), 1)
    assert share_LE.min() > 0
    assert (synthetic.popularity(name, 3, 64, 7) == share_LE).all()
    assert (synthetic.popularity(name, 3, 64, 8) != share_LE).any()


def test_skews():
    zipf = np.sort(synthetic.popularity("zipf:1.0", 2, 100, 0), axis=1)[:, ::-1]
    np.testing.assert_allclose(zipf[:, 0] / zipf[:, 9], 10)
    hot = np.sort(synthetic.popularity("hot4:0.4", 2, 256, 0), axis=1)
    np.testing.assert_allclose(hot[:, -4:], 0.1)
    rising = np.log(synthetic.popularity("r1like", 58, 256, 0)).std(axis=1)
    np.testing.assert_allclose([rising[:5].mean(), rising[-5:].mean()], [0.33, 1.02], rtol=0.1)


def test_drift_has_the_spread_and_memory_it_promises():
    share_LE = np.full((1, 2000), 1 / 2000)
    steps = np.log(np.array(list(islice(synthetic.drifting(share_LE, 0.2, 0, tau=10), 21)))[:, 0])
    steps -= steps.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(steps.std(axis=1), 0.2, rtol=0.1)
    assert np.corrcoef(steps[0], steps[10])[0, 1] == pytest.approx(np.exp(-1), abs=0.07)
    still = list(islice(synthetic.epochs(share_LE, 1.0, 0), 2))
    np.testing.assert_allclose(still[0], still[1])
    new = np.log(list(islice(synthetic.epochs(share_LE, 0.0, 0), 2)))
    assert abs(np.corrcoef(new[0, 0], new[1, 0])[0, 1]) < 0.1


def test_topics_move_experts_together():
    """Of drifting experts no few directions explain the movement; of mixed topics eleven explain all."""
    share_LE = synthetic.popularity("lognormal:0.8", 1, 64, 0)
    steps = np.array(list(islice(synthetic.mixed_topics(share_LE, 1.0, 0, tau=5), 60)))[:, 0]
    moved = np.linalg.svd(steps - steps.mean(axis=0), compute_uv=False)
    assert moved[synthetic.TOPICS - 1] < 1e-10 * moved[0]
    assert steps.std(axis=0).max() > 0.002


def test_tokens_are_whole_and_complete():
    share_LE = synthetic.popularity("zipf", 2, 8, 0)
    count = synthetic.tokens(synthetic.drifting(share_LE, 0.1, 0), 3, 1000, 0)
    assert count.shape == (3, 2, 8)
    assert count.dtype == np.int64
    assert (count.sum(axis=2) == 1000).all()


@pytest.mark.parametrize("name", ["zip", "zipf:", "zipf:a", "zipf:-1", "zipf:nan", "hot4:1", "pareto:1", "dirichlet:0"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError) as caught:
        synthetic.popularity(name, 1, 8, 0)
    assert (caught.value.field, caught.value.value) == ("load", name)
