"""What can be learnt, by name: the next token, or the tokens after it with Medusa heads on a frozen model.

An objective is pure: it knows no data, no optimiser and no step. It gives sums over tokens, and the step divides
them by the counts of the whole batch, so that accumulating over parts of a batch is the same as one large batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lin_jax.errors import UserError
from lin_jax.evaluation.head_accuracy import head_accuracy
from lin_jax.evaluation.perplexity import Perplexity, next_token_sums
from lin_jax.evaluation.targets import Batch, Sums, Targets, stack_targets, targets_ahead, token_sums
from lin_jax.models import Llama, LlamaConfig, MedusaHeads
from lin_jax.training.parameters import Params, abstract_heads, abstract_model, filled, initial_params, params_of

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


class Objective(Protocol):
    """What to learn. `coefficients` `[K]` weigh the mean losses of K predictors.

    Parameters that learn and parameters that do not are separate trees, so that only the former have gradients,
    moments and checkpoints.
    """

    coefficients: tuple[float, ...]

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Raises a `UserError` if a run's options do not fit this objective."""

    @classmethod
    def of(cls, config: "RunConfig") -> "Objective":
        """The objective of a run, whose model is fully described."""

    def start(self, key: Array, base: Llama | None) -> Params:
        """Initial values of the parameters that learn."""

    def frozen(self, base: Llama | None) -> Params:
        """The parameters that do not learn."""

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """How many targets a batch has, for each predictor."""

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums over the tokens of a batch."""

    def figures(self, sums: Sums) -> dict[str, float]:
        """What to report beside the loss, of sums on the host."""

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str | None:
        """Writes what else is worth knowing after the last step, and returns it as text."""


class LanguageModel:
    """Mean cross entropy of the next token, within a document."""

    coefficients = (1.0,)

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._abstract = abstract_model(config)

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Fits any run."""

    @classmethod
    def of(cls, config: "RunConfig") -> "LanguageModel":
        """The objective of a run."""
        return cls(config.model)

    def start(self, key: Array, base: Llama | None) -> Params:
        """Fresh parameters, or those of a base model."""
        fresh = params_of(jax.jit(lambda key: Llama(self._config, rngs=nnx.Rngs(key)))(key))
        return fresh if base is None else initial_params(fresh, params_of(base))

    def frozen(self, base: Llama | None) -> Params:
        """None: a base model's parameters go on learning."""
        return {}

    def counts(self, batch: Batch) -> Int[Array, "1"]:
        """Targets in the same document as their input."""
        return jnp.sum(targets_ahead(batch, 1).included)[None]

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[1]` over the tokens of a batch."""
        return next_token_sums(filled(self._abstract, params), batch)

    def figures(self, sums: Sums) -> dict[str, float]:
        """The perplexity."""
        return {"perplexity": Perplexity.of(sums).perplexity}

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str | None:
        """Nothing more."""
        return None


class Medusa:
    """Medusa-1 (Cai et al. 2024): `sum_m decay^m CE_m` over the heads m (from 0), on a frozen model.

    Head m predicts the token m + 2 after its position; the first head has weight one.
    """

    def __init__(self, config: LlamaConfig, heads: int, decay: float) -> None:
        self.heads = heads
        self.coefficients = tuple(decay**head for head in range(heads))
        self._base = abstract_model(config)
        self._heads = abstract_heads(config, heads)

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Needs a base model and texts long enough for the last head."""
        if config.init_from is None:
            raise UserError("objective 'medusa' needs init_from: the run folder of the model to put heads on")
        if config.medusa_heads < 1:
            raise UserError(f"medusa_heads is {config.medusa_heads}; give 1 or more")
        if config.data.sequence_length <= config.medusa_heads:
            raise UserError(
                f"data.sequence_length {config.data.sequence_length} leaves the last of {config.medusa_heads} heads "
                "nothing to predict; give a longer one"
            )

    @classmethod
    def of(cls, config: "RunConfig") -> "Medusa":
        """The objective of a run."""
        return cls(config.model, config.medusa_heads, config.medusa_decay)

    def start(self, key: Array, base: Llama | None) -> Params:
        """Heads that begin as copies of the base model's own."""
        assert base is not None, "checked with the configuration"
        return params_of(MedusaHeads.on(base, self.heads))

    def frozen(self, base: Llama | None) -> Params:
        """The base model."""
        assert base is not None, "checked with the configuration"
        return params_of(base)

    def counts(self, batch: Batch) -> Int[Array, " M"]:
        """Targets in the same document as their input, for each head."""
        return jnp.sum(self._targets(batch).included, axis=(0, 1))

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[M]` over the tokens of a batch."""
        base, heads = self.models(params, frozen)
        hidden = base.hidden(batch["tokens"][:, :-1], batch["documents"][:, :-1])
        return token_sums(heads(jax.lax.stop_gradient(hidden)), self._targets(batch))

    def figures(self, sums: Sums) -> dict[str, float]:
        """How often each head's first guess is right."""
        return {
            f"accuracy_head_{head}": float(correct) / max(int(tokens), 1)
            for head, (correct, tokens) in enumerate(zip(sums.correct, sums.tokens, strict=True))
        }

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str:
        """How often each guess of each head is right, as `head_accuracy.json` and as a table."""
        accuracy = head_accuracy(*self.models(params, frozen), batches)
        path = folder / "head_accuracy.json"
        accuracy.save(path)
        return f"how often each guess is the token that comes, in held-out text ({path}):\n{accuracy}"

    def models(self, params: Params, frozen: Params) -> tuple[Llama, MedusaHeads]:
        """The base model and its heads."""
        return filled(self._base, frozen), filled(self._heads, params)

    def _targets(self, batch: Batch) -> Targets:
        return stack_targets(targets_ahead(batch, head + 2) for head in range(self.heads))


OBJECTIVES: dict[str, type[Any]] = {"language_model": LanguageModel, "medusa": Medusa}
