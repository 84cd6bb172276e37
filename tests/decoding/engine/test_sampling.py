"""Choosing tokens: filters against transformers' own, and samples against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lin_jax.decoding.engine.sampling import (
    Sampling,
    choose_tokens,
    filter_logits,
    log_probabilities,
    penalised,
    perturb,
)
from lin_jax.errors import UserError

V = 40


def theirs(logits: np.ndarray, text: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `generate` makes of logits `[B, V]` behind a text `[B, T]`, in its order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor(text), torch.tensor(logits)).numpy()


def ours(logits: np.ndarray, text: np.ndarray, sampling: Sampling) -> np.ndarray:
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, text, True, axis=1)
    return np.asarray(
        filter_logits(penalised(jnp.asarray(logits), jnp.asarray(seen), sampling.repetition_penalty), sampling)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.0, top_k=1),
        Sampling(1.3, top_k=7),
        Sampling(1.0, top_k=V + 5),
        Sampling(1.0, top_p=0.5),
        Sampling(0.8, top_p=1e-9),
        Sampling(1.0, top_p=0.999),
        Sampling(1.0, min_p=0.05),
        Sampling(2.0, min_p=1.0),
        Sampling(1.0, repetition_penalty=1.3),
        Sampling(1.0, repetition_penalty=0.6),
        Sampling(0.9, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.2),
        Sampling(1.4, top_k=9, top_p=0.95, min_p=0.02, repetition_penalty=2.0),
    ],
)
def test_filters_are_those_of_transformers(sampling: Sampling, x64: None) -> None:
    rng = np.random.default_rng(0)
    logits, text = rng.normal(0, 2, (200, V)), rng.integers(0, V, (200, 12))
    expected, found = theirs(logits, text, sampling), ours(logits, text, sampling)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.6, 0.75, 0.9375])
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_top_p_of_equally_probable_tokens(top_p: float, kinds: int, x64: None) -> None:
    rng = np.random.default_rng(1)
    # Sixteen equal tokens, whose probabilities add up without rounding, or so many values, hardly ever at the boundary.
    logits, text = rng.integers(0, kinds, (100, 16)) * 1.0, np.zeros((100, 1), int)
    for sampling in (Sampling(1.0, top_p=top_p), Sampling(1.0, top_k=3, top_p=top_p)):
        expected = theirs(logits, text, sampling)
        np.testing.assert_array_equal(ours(logits, text, sampling), expected)
        assert np.isfinite(expected).any(axis=1).all()


def test_filters() -> None:
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_k=2))).tolist() == [True, True, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.79))).tolist() == [True, True, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.81))).tolist() == [True, True, True, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.01))).tolist() == [True, False, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, min_p=0.31))).tolist() == [True, True, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, min_p=0.29))).tolist() == [True, True, True, False]


def test_nothing_is_sorted_where_nothing_is_filtered() -> None:
    def operations(sampling: Sampling) -> str:
        return str(jax.make_jaxpr(lambda logits: filter_logits(logits, sampling))(jnp.zeros((2, V))))

    assert operations(Sampling(1.0)).count("=") == 0
    assert "sort" not in operations(Sampling(0.5, min_p=0.1))
    assert "sort" in operations(Sampling(1.0, top_p=0.9))


def test_samples_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    count = 20000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (1, count, 4))
    drawn = choose_tokens(logits, jnp.arange(count)[None], jnp.zeros(1, int), jnp.uint32(0), Sampling(1.0))
    observed = np.bincount(np.asarray(drawn)[0], minlength=4)
    chi_square = float(((observed - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert chi_square < chi2.ppf(0.999, 3)


def test_noise_that_is_made_once_for_each_position_is_the_same() -> None:
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(0, 1, (3, 9, V)))
    positions = jnp.asarray([[5], [0], [9]]) + jnp.asarray([0, 1, 1, 1, 2, 2, 3, 3, 3])
    where = (logits, positions, jnp.arange(3), jnp.uint32(1), Sampling(1.2, top_k=9))
    for span in (4, 6, 9, 20):
        np.testing.assert_array_equal(perturb(*where, span=span), perturb(*where))
        np.testing.assert_array_equal(choose_tokens(*where, span=span), choose_tokens(*where))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_penalty_is_part_of_the_choice(temperature: float) -> None:
    logits = jnp.asarray([[[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]]])
    seen = jnp.asarray([[[False, False, False], [True, False, True]]])
    sampling = Sampling(temperature, repetition_penalty=2.0)
    where = (jnp.asarray([[4, 4]]), jnp.asarray([0]), jnp.uint32(0))
    scores = perturb(logits, *where, sampling, seen)
    # The positions are the same, and so is the noise.
    np.testing.assert_allclose(scores[0, 1] - scores[0, 0], [-1.0, 0.0, -1.0], atol=1e-6)
    assert choose_tokens(logits, *where, sampling, seen).tolist() == jnp.argmax(scores, axis=-1).tolist()
    if not temperature:
        assert choose_tokens(logits, *where, sampling, seen).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="seen"):
        choose_tokens(logits, *where, sampling)


def test_log_probabilities_are_the_models_own(x64: None) -> None:
    rng = np.random.default_rng(2)
    logits, tokens = rng.normal(0, 3, (3, 4, 9)), rng.integers(0, 9, (3, 4))
    expected = torch.log_softmax(torch.tensor(logits), -1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    np.testing.assert_allclose(log_probabilities(jnp.asarray(logits), jnp.asarray(tokens)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"min_p": 1.5}, "min-p is 1.5"),
        ({"min_p": -0.1}, "min-p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition penalty is inf"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-9, 1e-10, 1e-39, 1e-46, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.3}])
def test_the_coldest_samples_are_greedy(temperature: float, options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 30, (4, 2, V)), jnp.float32)
    seen = jnp.asarray(rng.random(logits.shape) < 0.5)
    places = (jnp.zeros((4, 2), jnp.int32), jnp.arange(4), jnp.uint32(3))
    cold = choose_tokens(logits, *places, Sampling(temperature, **options), seen)
    greedy = Sampling(repetition_penalty=options.get("repetition_penalty", 1.0))
    assert cold.tolist() == choose_tokens(logits, *places, greedy, seen).tolist()
    warm = filter_logits(logits, Sampling(1e-9, **options))
    assert not np.isnan(warm).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("huge", [1e30, 1e39, 1e300])
def test_the_hottest_samples_are_uniform(huge: float) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 30, (1, 4000, 5)), jnp.float32)
    positions = jnp.arange(4000)[None]
    drawn = choose_tokens(logits, positions, jnp.arange(1), jnp.uint32(3), Sampling(huge))
    counts = np.bincount(np.asarray(drawn)[0], minlength=5)
    assert ((counts - 800) ** 2 / 800).sum() < chi2.ppf(0.9999, 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [1e30, 1e300, 1e-30, 1e-300])
def test_boundless_penalties_keep_an_order(penalty: float) -> None:
    """Seen tokens come behind all others, or before them, in the order that any large penalty gives them."""
    logits = jnp.asarray([[3.0, -1.0, 0.0, 2.0, -2.0, 1.0]])
    seen = jnp.asarray([[True, True, False, False, True, True]])
    found = np.asarray(penalised(logits, seen, Sampling(repetition_penalty=penalty).repetition_penalty))
    assert np.isfinite(found).all()
    expected = np.asarray(penalised(logits, seen, 1e6 if penalty > 1 else 1e-6))
    assert np.argsort(found[0]).tolist() == np.argsort(expected[0]).tolist()
