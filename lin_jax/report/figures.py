"""Figures of a report, and their mean and spread over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from lin_jax.evaluation.agreement import Agreement
from lin_jax.evaluation.token_losses import PositionBucket, Ratio

# Parts that a model can have in a report: the teacher itself, the teacher with a window and no training, a student.
TEACHER, BASELINE, STUDENT = "teacher", "baseline", "student"


@dataclass(frozen=True)
class ModelFigures:
    """Figures of one model.

    Attributes:
        name: of the model; students of several seeds share one.
        place: where it lies.
        kind: teacher, baseline or student.
        attention: its attention, in words.
        perplexity: of the held-out text.
        ratio: the same over the teacher's.
        positions: the ratio by position in the document.
        agreement: with the teacher's own continuations; None for the teacher.
        ablations: ratio to the teacher's perplexity without each branch.
        state_bytes: size of a sequence's decode state.
        state_grows: whether that is its size at the report's row length, and grows with the text.
        decode_tokens_per_second: of plain decoding; None if it was not measured.
        training_tokens_per_second: of training steps; None if it was not measured.
    """

    name: str
    place: str
    kind: str
    attention: str
    perplexity: float
    ratio: Ratio
    positions: tuple[PositionBucket, ...]
    agreement: Agreement | None
    ablations: dict[str, Ratio]
    state_bytes: int
    state_grows: bool
    decode_tokens_per_second: float | None = None
    training_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a student.

    Attributes:
        mean: over the seeds.
        deviation: their standard deviation (of a sample).
        low: the lowest.
        high: the highest.
    """

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least two values."""
        return cls(mean(values), stdev(values), min(values), max(values))


@dataclass(frozen=True)
class SeedFigures:
    """Figures of a student over its seeds.

    Attributes:
        name: of the student.
        seeds: how many there are.
        figures: by what they are of.
    """

    name: str
    seeds: int
    figures: dict[str, Spread]


@dataclass(frozen=True)
class QualityReport:
    """A report on some students of one teacher.

    Attributes:
        teacher: place of the teacher.
        text: name of the held-out text.
        tokens: how many were predicted.
        rows: in how many rows.
        row_length: tokens of a row.
        training_length: tokens of the rows that students were trained on.
        joined: whether a row is one text from its first token to its last, whatever documents it is made of.
        prompts: how many prompts were continued.
        new_tokens: tokens of a continuation at most.
        device: where speeds were measured.
        models: figures of each model, the teacher first.
        notes: what is missing, and why.
    """

    teacher: str
    text: str
    tokens: int
    rows: int
    row_length: int
    training_length: int
    joined: bool
    prompts: int
    new_tokens: int
    device: str
    models: tuple[ModelFigures, ...]
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[SeedFigures, ...]:
        """Mean and spread of the students that are there with several seeds."""
        names = dict.fromkeys(each.name for each in self.models if each.kind == STUDENT)
        groups = ([each for each in self.models if each.kind == STUDENT and each.name == name] for name in names)
        return tuple(
            SeedFigures(group[0].name, len(group), _spreads(group, self.training_length))
            for group in groups
            if len(group) > 1
        )

    def as_json(self) -> dict[str, Any]:
        """All figures, the ratios of buckets included, as JSON has them."""
        content = asdict(self)
        for model, shown in zip(self.models, content["models"], strict=True):
            shown["positions"] = [asdict(each) | {"ratio": each.ratio} for each in model.positions]
        return content | {"seeds": [asdict(each) for each in self.seeds]}


def beyond(model: ModelFigures, length: int) -> float:
    """Perplexity over the teacher's of the tokens beyond a position; NaN without any."""
    buckets = [each for each in model.positions if each.begin >= length]
    tokens = sum(each.tokens for each in buckets)
    return math.exp(sum(each.tokens * math.log(each.ratio) for each in buckets) / tokens) if tokens else math.nan


def _spreads(group: Sequence[ModelFigures], training_length: int) -> dict[str, Spread]:
    figures: dict[str, Callable[[ModelFigures], float]] = {
        "perplexity": lambda each: each.perplexity,
        "ratio": lambda each: each.ratio.value,
        "ratio_beyond_training_length": lambda each: beyond(each, training_length),
        "equal_tokens": lambda each: math.nan if each.agreement is None else each.agreement.equal,
    }
    found = {name: [value(each) for each in group] for name, value in figures.items()}
    return {name: Spread.of(values) for name, values in found.items() if not any(map(math.isnan, values))}
