"""Metrics of text classification, as GLUE (Wang et al. 2019) has them, from a model's answers to all texts.

Classes are scored from counts, exactly; numbers from all predictions together, in float64, since a rank correlation is
no sum over batches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Answers(NamedTuple):
    """Sums over the texts of a batch, `[1]` each as in `Sums`, and beside them the answer to each text.

    `scores` are logits of classes `[B, C]`, or predicted numbers `[B, 1]`; `labels` `[B]`; `part` `[B]` is the
    number of the set that a text is from, -1 in rows that are none.
    """

    loss: Any
    correct: Any
    tokens: Any
    scores: Any
    labels: Any
    part: Any

    @classmethod
    def joined(cls, each: Sequence["Answers"]) -> "Answers":
        """The sums over several batches, in float64 and int64 on the host, and the answers to all their texts."""
        wide = (np.float64, np.int64, np.int64)
        sums = [np.sum([answers[n] for answers in each], axis=0, dtype=dtype) for n, dtype in enumerate(wide)]
        rows = [np.concatenate(part) for part in list(zip(*each, strict=True))[len(wide) :]]
        return cls(*sums, *rows)

    def of(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """The answers to the texts of one set: scores `[N, C]` and labels `[N]`."""
        chosen = np.asarray(self.part) == part
        return np.asarray(self.scores)[chosen], np.asarray(self.labels)[chosen]


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts `[C, C]` of texts by their class (rows) and the class they were given (columns)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def accuracy(counts: np.ndarray) -> float:
    """Share of right answers among counts `[C, C]`."""
    return float(np.trace(counts) / max(counts.sum(), 1))


def f1(counts: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1 among counts `[2, 2]`; zero where nothing of it was found."""
    both = counts[1].sum() + counts[:, 1].sum()
    return float(2 * counts[1, 1] / both) if both else 0.0


def matthews(counts: np.ndarray) -> float:
    """Correlation of classes and answers among counts `[C, C]` (Matthews 1975); zero where either is always the same.

    With s texts, c right ones, t_k texts of class k and p_k answers k: `(c s - t p) / sqrt((s^2 - p p)(s^2 - t t))`.
    """
    exact = counts.astype(object)  # Python's integers: squares of counts leave 64 bits behind.
    texts, answers, total = exact.sum(axis=1), exact.sum(axis=0), exact.sum()
    spread = (total**2 - answers @ answers) * (total**2 - texts @ texts)
    return float((np.trace(exact) * total - texts @ answers) / float(spread) ** 0.5) if spread else 0.0


def pearson(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Linear correlation of numbers `[N]`; zero where either is always the same."""
    centred = [np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (truth, predicted)]
    spread = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / spread) if spread > 0 else 0.0


def spearman(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Linear correlation of the ranks of numbers `[N]`, equal ones sharing the mean of theirs."""
    return pearson(_ranks(truth), _ranks(predicted))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


_OF_CLASSES: Mapping[str, Callable[[np.ndarray], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
_OF_NUMBERS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {"pearson": pearson, "spearman": spearman}


def scored(scores: np.ndarray, labels: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics by name, of logits `[N, C]` and classes `[N]`, or of predictions `[N, 1]` and numbers `[N]`."""
    if any(name in _OF_NUMBERS for name in metrics):
        return {name: _OF_NUMBERS[name](labels, scores[:, 0]) for name in metrics}
    counts = confusion(labels, np.argmax(scores, axis=-1), scores.shape[-1])
    return {name: _OF_CLASSES[name](counts) for name in metrics}
