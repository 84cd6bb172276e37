"""GLUE's metrics against their definitions, text by text, and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from lin_jax.evaluation.classification import Answers, confusion, f1, matthews, pearson, scored, spearman
from lin_jax.losses.cross_entropy import Sums, sum_over_batches


def by_definition(labels: list[int], guesses: list[int]) -> dict[str, float]:
    """Precision, recall and the rest from four numbers, counted one text at a time."""
    pairs = list(zip(labels, guesses, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0)))
    precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "matthews": (tp * tn - fp * fn) / spread**0.5 if spread else 0.0,
    }


@pytest.mark.parametrize("seed", range(8))
def test_two_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 50) if seed else np.zeros(50, np.int64)
    scores = rng.normal(size=(50, 2)) + 0.7 * np.eye(2)[labels]
    expected = by_definition(labels.tolist(), scores.argmax(-1).tolist())
    assert scored(scores, labels, list(expected)) == pytest.approx(expected, abs=1e-12)


def test_three_classes_correlate_like_indicators() -> None:
    """Matthews' correlation of C classes is that of their indicators' covariances (Gorodkin 2004)."""
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    guesses[:120] = labels[:120]
    x, y = np.eye(3)[guesses] - np.eye(3)[guesses].mean(0), np.eye(3)[labels] - np.eye(3)[labels].mean(0)
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(confusion(labels, guesses, 3)) == pytest.approx(expected, abs=1e-12)


def test_counts_beyond_64_bits() -> None:
    assert matthews(np.array([[4 * 10**9, 0], [0, 4 * 10**9]])) == pytest.approx(1.0)


@pytest.mark.parametrize("ties", [False, True])
def test_numbers(ties: bool) -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=99).astype(np.float32) + 100
    guesses = (truth + rng.normal(size=99)).astype(np.float32)
    if ties:
        truth, guesses = np.round(truth), np.round(guesses)
    wide = truth.astype(np.float64), guesses.astype(np.float64)
    assert pearson(truth, guesses) == pytest.approx(stats.pearsonr(*wide).statistic, abs=1e-10)
    assert spearman(truth, guesses) == pytest.approx(stats.spearmanr(*wide).statistic, abs=1e-10)


def test_what_is_undefined_is_zero() -> None:
    same = np.ones(5)
    assert pearson(same, np.arange(5.0)) == spearman(np.arange(5.0), same) == 0.0
    assert f1(np.array([[5, 0], [0, 0]])) == matthews(np.array([[5, 0], [2, 0]])) == 0.0


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_batches_join_exactly(size: int) -> None:
    """However rows are cut into batches, with filled-up rows or without, every set has the same metrics."""
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(10, 2)), rng.integers(0, 2, 10)
    part = np.array([0] * 6 + [1] * 4)

    def answers(start: int) -> Answers:
        fill = size - len(labels[start : start + size])
        said = np.pad(scores[start : start + size], [(0, fill), (0, 0)])
        known = np.pad(labels[start : start + size], (0, fill))
        real = len(part[start : start + size])
        sums = np.array([float(real)]), np.array([1]), np.array([real])
        return Answers(*sums, said, known, np.pad(part[start : start + size], (0, fill), constant_values=-1))

    joined = sum_over_batches(answers, range(0, 10, size))
    assert joined.tokens.tolist() == [10]
    assert joined.loss.dtype == np.float64
    for number in range(2):
        found, known = joined.of(number)
        np.testing.assert_array_equal(found, scores[part == number])
        np.testing.assert_array_equal(known, labels[part == number])


def test_sums_join_wide() -> None:
    each = [Sums(np.float32([1e8]), np.int32([2**30]), np.int32([2**30])) for _ in range(3)]
    joined = Sums.joined(each)
    assert joined.loss[0] == 3e8
    assert joined.tokens[0] == 3 * 2**30
