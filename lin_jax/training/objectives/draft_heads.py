"""The common part of draft heads on a frozen model: the loss over depths, and the reports."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lin_jax.evaluation.head_accuracy import ACCURACY_FILE, DraftHeads, head_accuracy
from lin_jax.losses.cross_entropy import Batch, Sums, distillation_sums, inputs_of, path_ahead, token_sums
from lin_jax.models import CausalModel, MedusaHeads, ModelConfig, PathHead
from lin_jax.models.params import Params, abstract_model, filled, params_of
from lin_jax.training.objectives.objective import PartRate

Heads = TypeVar("Heads", MedusaHeads, PathHead)


class DraftHeadObjective(Generic[Heads]):
    """`sum_k decay^k CE_k` over the depths k (from 0) that heads guess at, on a frozen model.

    Depth k is the token k + 2 after a position; the first depth has weight one. CE is against the tokens of the text,
    or against the model's own distribution after the text before them (as EAGLE, Li et al. 2024, and distillation do):
    what heads are to guess is what the model would say, whoever wrote the text.

    Args:
        config: the frozen model's.
        heads: the heads, of shapes.
        depth: how many depths K.
        decay: of the weights.
        targets: one of HEAD_TARGETS.
    """

    depth_name: ClassVar[str]
    rates: Mapping[str, PartRate] = {}

    def __init__(self, config: ModelConfig, heads: Heads, depth: int, decay: float, targets: str) -> None:
        self.depth = depth
        self._targets = targets
        self.coefficients = tuple(decay**each for each in range(depth))
        self._base = abstract_model(config)
        self._heads: Heads = heads

    @abstractmethod
    def new_heads(self, key: Array, base: CausalModel) -> Heads:
        """Heads as they begin on a base model."""

    def shapes(self) -> Params:
        """The heads' parameters, without values."""
        return params_of(self._heads)

    def start(self, key: Array, base: CausalModel | None) -> Params:
        """Heads that begin from the base model's own."""
        assert base is not None, "checked with the configuration"
        return params_of(self.new_heads(key, base))

    def frozen(self, base: CausalModel | None) -> Params:
        """The base model."""
        assert base is not None, "checked with the configuration"
        return params_of(base)

    def modules(self) -> Sequence[Any]:
        """The base model, and the heads."""
        return [self._base, self._heads]

    def parts(self, params: Params, frozen: Params) -> tuple[None, Heads]:
        """No model, and the heads."""
        return None, filled(self._heads, params)

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """Targets in the same document as their input, for each depth."""
        return jnp.sum(path_ahead(batch, self.depth)[1].included, axis=(0, 1))

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[K]` over the tokens of a batch."""
        base = filled(self._base, frozen)
        hidden = jax.lax.stop_gradient(base.hidden(*inputs_of(batch)))
        path, targets = path_ahead(batch, self.depth)
        guesses = self.parts(params, frozen)[1].guess(hidden, path)
        if self._targets == "text":
            return token_sums(guesses, targets)
        return distillation_sums(guesses, jax.lax.stop_gradient(base.logits(hidden)), targets.included)

    def figures(self, sums: Sums) -> dict[str, float]:
        """Accuracy of the first guess at each depth."""
        return accuracies(sums, self.depth_name)

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str:
        """Measures the accuracy of each guess at each depth, as `head_accuracy.json` and as a table."""
        return report_heads(filled(self._base, frozen), self.parts(params, frozen)[1], self.depth, batches, folder)


def accuracies(sums: Sums, name: str) -> dict[str, float]:
    """Accuracies of the first guess, of sums `[K]` on the host, as `accuracy_NAME_K`."""
    return {
        f"accuracy_{name}_{depth}": float(correct) / max(int(tokens), 1)
        for depth, (correct, tokens) in enumerate(zip(sums.correct, sums.tokens, strict=True))
    }


def report_heads(
    model: CausalModel, heads: DraftHeads, depth: int, batches: Sequence[Batch], folder: Path | None
) -> str:
    """Measures how often each guess of heads is right: written as `head_accuracy.json`, returned as a table."""
    accuracy = head_accuracy(model, heads, batches, depth=depth)
    written = ""
    if folder is not None:
        path = folder / ACCURACY_FILE
        accuracy.save(path)
        written = f" ({path})"
    return f"accuracy in held-out text{written}\n{accuracy}"
