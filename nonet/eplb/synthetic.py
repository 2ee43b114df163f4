"""Made-up expert loads: how popular experts are, how that moves from step to step, and the whole tokens of each step.

Used by the simulator, the advisor, tests and benchmarks; everything is a function of its seed. Popularity comes by
name (`popularity("zipf:1.0", ...)`); a step model moves it: each expert by itself (`drifting`), in correlated groups
(`mixed_topics`), or from epoch to epoch (`epochs`); `tokens` draws what the ranks of a step really route.
Legend: N steps, L MoE layers, E experts, R source ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from nonet.errors import ConfigError, nearest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CORRELATION_STEPS = 50  # after which a drift has mostly forgotten itself
TOPICS = 12
TOPIC_SIGMA = 1.0  # of a topic's own log-shares, beside what all topics share
MIXING = {"weak": 0.52, "strong": 0.78}  # standard deviation of a topic's log-weight in a batch


def _spread(low: float, high: float, layers: int) -> Floats:
    """[L, 1] rising over the layers."""
    return np.linspace(low, high, layers)[:, None]


def _bounded_power(rng: np.random.Generator, shape: tuple[int, int], exponent: float) -> Floats:
    """Density x^-exponent between 1 and 128, by inversion; exponent 1.01 is almost uniform in log x."""
    low, high = 1.0, 128.0 ** (1 - exponent)
    return np.asarray((low + rng.random(shape) * (high - low)) ** (1 / (1 - exponent)))


def _hot(rng: np.random.Generator, shape: tuple[int, int], count: int, part: float) -> Floats:
    """`count` experts take `part` of all; the others lie between half and 1.5 times their mean."""
    cold = rng.uniform(0.5, 1.5, shape)
    cold[:, :count] = 0.0
    cold *= (1 - part) / cold.sum(axis=1, keepdims=True)
    cold[:, :count] = part / count
    return cold


_Maker = Callable[[np.random.Generator, tuple[int, int], float], Floats]
_MAKERS: dict[str, tuple[float, _Maker]] = {  # default of the number after the colon, and the popularity
    "uniform": (0.2, lambda rng, shape, noise: np.maximum(1 + noise * rng.standard_normal(shape), 0.05)),
    "zipf": (1.0, lambda rng, shape, s: np.tile(np.arange(1, shape[1] + 1) ** -s, (shape[0], 1))),
    "lognormal": (1.0, lambda rng, shape, sigma: np.exp(sigma * rng.standard_normal(shape))),
    "dirichlet": (1.0, lambda rng, shape, alpha: rng.gamma(alpha, size=shape) + 1e-12),
    "hot4": (0.4, lambda rng, shape, part: _hot(rng, shape, 4, part)),
    "pareto": (1.01, lambda rng, shape, exponent: _bounded_power(rng, shape, exponent)),
    "r1like": (1.0, lambda rng, shape, f: np.exp(f * _spread(0.30, 1.05, shape[0]) * rng.standard_normal(shape))),
    "calibrated": (1.0, lambda rng, shape, f: np.exp(f * _spread(0.7, 1.2, shape[0]) * rng.standard_normal(shape))),
}
NAMES = tuple(_MAKERS)


def parse(name: str, field: str = "load") -> tuple[str, float]:
    """A distribution's name and number, as in "zipf:1.2"; the number has a default. Raises ConfigError."""
    word, colon, text = name.partition(":")
    if word not in _MAKERS:
        raise ConfigError(field, name, nearest(word, _MAKERS))
    try:
        number = float(text) if colon else _MAKERS[word][0]
    except ValueError:
        raise ConfigError(field, name, f"{text!r} is not a number") from None
    limit = {"hot4": 0.99, "lognormal": 8.0, "r1like": 8.0, "calibrated": 8.0, "zipf": 8.0, "uniform": 8.0}.get(
        word, 100
    )
    if not 0 <= number <= limit or (number == 0 and word == "dirichlet") or (word == "pareto" and not number > 1):
        raise ConfigError(
            field, name, f"the number of {word} lies between {1 if word == 'pareto' else 0} and {limit:g}"
        )
    return word, number


def popularity(name: str, num_layers: int, num_experts: int, seed: int) -> Floats:
    """[L, E] shares of the tokens, summing to 1 a layer; experts are in random order, layer by layer.

    uniform:noise, zipf:exponent, lognormal:sigma, dirichlet:alpha, hot4:part (4 experts take it), pareto:exponent
    (bounded, 1 to 128; 1.01 as NVIDIA's aiconfigurator assumes for DeepSeek), r1like and calibrated (log-normal with
    sigma rising over the layers, 0.30 to 1.05 and 0.7 to 1.2; the second comes near what TensorRT-LLM published for
    DeepSeek-R1). Raises ConfigError for an unknown name.
    """
    word, number = parse(name)
    rng = np.random.default_rng((seed, 1))
    shares = _MAKERS[word][1](rng, (num_layers, num_experts), number)
    return rng.permuted(shares / shares.sum(axis=1, keepdims=True), axis=1)


def drifting(share_LE: Floats, sd: float, seed: int, tau: float = CORRELATION_STEPS) -> Iterator[Floats]:
    """[L, E] shares of each step, without end: every expert's log-share follows an AR(1) process by itself.

    sd: its standard deviation, in the long run and from the first step; tau: steps after which its correlation is 1/e.
    """
    rng = np.random.default_rng((seed, 2))
    keep = np.exp(-1 / tau)
    z = rng.standard_normal(share_LE.shape)
    while True:
        p = share_LE * np.exp(sd * z)
        yield p / p.sum(axis=1, keepdims=True)
        z = keep * z + np.sqrt(1 - keep * keep) * rng.standard_normal(share_LE.shape)


def mixed_topics(share_LE: Floats, mixing: float, seed: int, tau: float = CORRELATION_STEPS) -> Iterator[Floats]:
    """[L, E] shares of each step, without end: a batch mixes 12 topics, each with its own popular experts.

    The logarithms of the topics' weights follow AR(1) processes with standard deviation `mixing` (MIXING has two that
    are used by name); experts of a topic rise and fall together, in all layers at once.
    """
    rng = np.random.default_rng((seed, 3))
    topic_KLE = share_LE * np.exp(TOPIC_SIGMA * rng.standard_normal((TOPICS, *share_LE.shape)))
    topic_KLE /= topic_KLE.sum(axis=2, keepdims=True)
    keep = np.exp(-1 / tau)
    z = rng.standard_normal(TOPICS)
    while True:
        weight = np.exp(mixing * z)
        yield np.tensordot(weight / weight.sum(), topic_KLE, axes=1)
        z = keep * z + np.sqrt(1 - keep * keep) * rng.standard_normal(TOPICS)


def epochs(share_LE: Floats, correlation: float, seed: int, sd: float = 0.3) -> Iterator[Floats]:
    """[L, E] shares of each epoch, without end: `drifting` with a correlation from one epoch to the next."""
    tau = np.inf if correlation >= 1 else 1e-3 if correlation <= 0 else -1 / np.log(correlation)
    return drifting(share_LE, sd, seed, tau)


def tokens(shares: Iterator[Floats], num_steps: int, per_step: int, seed: int) -> Ints:
    """int64 [N, L, E]: the shares of each step drawn as whole (token, expert) pairs, `per_step` of them a layer."""
    rng = np.random.default_rng((seed, 4))
    steps = [rng.multinomial(per_step, share_LE) for share_LE, _ in zip(shares, range(num_steps), strict=False)]
    return np.stack(steps).astype(np.int64)
