"""What an objective is.

An objective is pure: it knows no data, no optimiser and no step. It gives sums over tokens, and the step divides
them by the counts of the whole batch, so that accumulating over parts of a batch is the same as one large batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxtyping import Array, Int

from lin_jax.evaluation.targets import Batch, Sums
from lin_jax.models import MedusaHeads, PathHead
from lin_jax.training.parameters import Params

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


@dataclass(frozen=True)
class PartRate:
    """How fast one part of the parameters learns.

    Attributes:
        factor: its learning rate, as a multiple of the run's.
        first_step: the first step (from 0) that changes it; in those before, its learning rate is zero.
    """

    factor: float = 1.0
    first_step: int = 0


class Objective(Protocol):
    """What to learn. `coefficients` `[K]` weigh the mean losses of K predictors.

    Parameters that learn and parameters that do not are separate trees, so that only the former have gradients,
    moments and checkpoints.

    Attributes:
        has_model: whether a model is among what learns; if not, heads learn on one that is frozen, and checkpoints
            refer to it.
        purpose: what the model that learns, or that heads learn on, is for, as the registry of models has it.
        heads_name: what messages call the heads that learn; None without heads.
        coefficients: `[K]`.
        rates: how fast the parts of the parameters learn, by their names; empty where all learn alike.
    """

    has_model: ClassVar[bool]
    purpose: ClassVar[str]
    heads_name: ClassVar[str | None]
    coefficients: tuple[float, ...]
    rates: Mapping[str, PartRate]

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Raises a `UserError` if a run's options do not fit this objective."""

    @classmethod
    def of(cls, config: "RunConfig") -> "Objective":
        """The objective of a run, whose model is fully described; raises a `UserError` if there can be no such one."""

    def shapes(self) -> Params:
        """The parameters that learn, without values."""

    def start(self, key: Array, base: Any) -> Params:
        """Initial values of the parameters that learn, those of a base model (or None) where it has them."""

    def frozen(self, base: Any) -> Params:
        """The parameters that do not learn."""

    def modules(self) -> Sequence[Any]:
        """Modules of shapes that all parameters belong to, learnt or not, by the ends of their paths."""

    def parts(self, params: Params, frozen: Params) -> tuple[Any, MedusaHeads | PathHead | None]:
        """The model and the heads that learn, each None if it does not, made of what learns and what does not."""

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """How many targets a batch has, for each predictor."""

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums over the tokens of a batch."""

    def figures(self, sums: Sums) -> dict[str, float]:
        """What to report beside the loss, of sums on the host."""

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str | None:
        """Writes what else is worth knowing after the last step, and returns it as text."""
