"""The contract of objectives.

An objective is pure: it knows no data, no optimizer and no step, and what it draws at random in training comes from a
key that the step hands it. It gives sums over tokens, and the step divides them
by the counts of the whole batch, so that accumulating over microbatches is the same as one large batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Int

from lin_jax.losses.cross_entropy import Batch, Sums
from lin_jax.models import MedusaHeads, PathHead
from lin_jax.models.params import Params


@dataclass(frozen=True)
class PartRate:
    """Learning rate of one part of the parameters.

    Attributes:
        factor: its learning rate, as a multiple of the run's.
        first_step: the first step (from 0) that changes it; in those before, its learning rate is zero.
    """

    factor: float = 1.0
    first_step: int = 0


class Objective(Protocol):
    """An objective of training. `coefficients` `[K]` weigh the mean losses of K predictors.

    Trained and frozen parameters are separate trees, so that only the former have gradients, moments and checkpoints.

    Attributes:
        coefficients: `[K]`.
        rates: learning rates of the parts of the parameters, by their names; empty where all learn alike.
    """

    coefficients: tuple[float, ...]
    rates: Mapping[str, PartRate]

    def shapes(self) -> Params:
        """Shapes of the trained parameters."""

    def start(self, key: Array, base: Any) -> Params:
        """Initial values of the trained parameters, those of a base model (or None) where it has them."""

    def frozen(self, base: Any) -> Params:
        """Parameters that are not trained."""

    def modules(self) -> Sequence[Any]:
        """Modules of shapes that all parameters belong to, trained or not, by the ends of their paths."""

    def parts(self, params: Params, frozen: Params) -> tuple[Any, MedusaHeads | PathHead | None]:
        """The trained model and the trained heads, each None if there is none."""

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """Number of targets of a batch, for each predictor."""

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums over the tokens of a batch."""

    def figures(self, sums: Sums) -> dict[str, float]:
        """Metrics to report beside the loss, from sums on the host."""

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str | None:
        """Evaluates what else is worth knowing after the last step, as text; writes it, if a folder is given."""


@runtime_checkable
class RandomObjective(Protocol):
    """An objective that draws something at random in training, and nothing in validation."""

    def training_sums(self, params: Params, frozen: Params, batch: Batch, key: Array) -> Sums:
        """Sums over the tokens of a batch, as `sums`, with what a key draws."""


def training_sums(objective: Objective, params: Params, frozen: Params, batch: Batch, key: Array | None) -> Sums:
    """Sums of any objective in a training step; without a key, or anything to draw, those of validation."""
    if key is not None and isinstance(objective, RandomObjective):
        return objective.training_sums(params, frozen, batch, key)
    return objective.sums(params, frozen, batch)
