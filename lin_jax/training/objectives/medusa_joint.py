"""A model and its Medusa heads, learning together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from lin_jax.losses.cross_entropy import Batch, Sums, Targets, inputs_of, path_ahead, shifted_targets, token_sums
from lin_jax.models import CausalModel, MedusaHeads, ModelConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.params import Params, abstract_heads, filled, params_of
from lin_jax.training.objective_configs import HeadsConfig
from lin_jax.training.objectives.draft_heads import accuracies, report_heads
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.objectives.objective import PartRate


class MedusaJoint:
    """Medusa-2 (Cai et al. 2024): `CE + coefficient * sum_m decay^m CE_m` over the heads m (from 0).

    Parameters are `model` and `heads`. The heads learn at a learning rate of their own, and for the first steps alone.

    Args:
        config: the model's.
        depth: how many heads M.
        heads: their weights in the loss, their learning rate and warm-up.
        adapters: on the model, or None.
    """

    def __init__(
        self, config: ModelConfig, depth: int, heads: HeadsConfig, adapters: AdapterConfig | None = None
    ) -> None:
        self.depth = depth
        self.coefficients = (1.0, *(heads.loss_weight * heads.decay**head for head in range(depth)))
        self.rates: Mapping[str, PartRate] = {
            "model": PartRate(first_step=heads.warmup_steps),
            "heads": PartRate(factor=heads.learning_rate_factor),
        }
        self._language_model = NextToken(config, adapters)
        self._heads = abstract_heads(config, depth)

    def shapes(self) -> Params:
        """The parameters of both, without values."""
        return {"model": self._language_model.shapes(), "heads": params_of(self._heads)}

    def start(self, key: Array, base: CausalModel | None) -> Params:
        """The base model's parameters, and heads that begin as copies of its own."""
        assert base is not None, "checked with the configuration"
        heads = params_of(MedusaHeads.on(base, self.depth))
        return {"model": self._language_model.start(key, base), "heads": heads}

    def frozen(self, base: CausalModel | None) -> Params:
        """None."""
        return {}

    def modules(self) -> Sequence[Any]:
        """The model, and the heads."""
        return [*self._language_model.modules(), self._heads]

    def parts(self, params: Params, frozen: Params) -> tuple[CausalModel, MedusaHeads]:
        """The model and its heads."""
        return self._language_model.parts(params["model"], frozen)[0], filled(self._heads, params["heads"])

    def counts(self, batch: Batch) -> Int[Array, " 1+M"]:
        """Targets in the same document as their input: of the model, and of each head."""
        following, ahead = self._targets(batch)
        return jnp.concatenate([jnp.sum(each.included, axis=(0, 1)) for each in (following, ahead)])

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[1 + M]` over the tokens of a batch: of the model, and of each head."""
        model, heads = self.parts(params, frozen)
        hidden = model.hidden(*inputs_of(batch))
        following, ahead = self._targets(batch)
        own = token_sums(model.logits(hidden)[..., None, :], following)
        return Sums(*map(lambda *parts: jnp.concatenate(parts), own, token_sums(heads(hidden), ahead)))

    def figures(self, sums: Sums) -> dict[str, float]:
        """The perplexity, and how often each head's first guess is right."""
        heads = Sums(*(part[1:] for part in sums))
        return {**self._language_model.figures(sums), **accuracies(heads, "head")}

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str:
        """Measures the accuracy of each guess of each head, as `head_accuracy.json` and as a table."""
        return report_heads(*self.parts(params, frozen), self.depth, batches, folder)

    def _targets(self, batch: Batch) -> tuple[Targets, Targets]:
        """The next tokens `[B, T, 1]`, and those of the heads `[B, T, M]`."""
        following = shifted_targets(batch, 1)
        return Targets(*(part[..., None] for part in following)), path_ahead(batch, self.depth)[1]
