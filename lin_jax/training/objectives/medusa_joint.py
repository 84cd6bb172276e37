"""A model and its Medusa heads, learning together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from lin_jax.errors import UserError
from lin_jax.evaluation.targets import Batch, Sums, Targets, inputs_of, path_ahead, targets_ahead, token_sums
from lin_jax.models import CausalModel, MedusaHeads, ModelConfig
from lin_jax.models.registry import CAUSAL_LM
from lin_jax.training.adapters import AdapterConfig
from lin_jax.training.objectives.frozen_base import accuracies, check_heads, report_heads
from lin_jax.training.objectives.language_model import LanguageModel
from lin_jax.training.objectives.objective import PartRate
from lin_jax.training.parameters import Params, abstract_heads, filled, params_of

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


class MedusaJoint:
    """Medusa-2 (Cai et al. 2024): `CE + coefficient * sum_m decay^m CE_m` over the heads m (from 0).

    Parameters are `model` and `heads`. The heads learn at a learning rate of their own, and for the first steps alone.

    Args:
        config: the model's.
        heads: how many heads M.
        decay: head m weighs `decay^m` among the heads.
        coefficient: weight of the heads' losses beside the model's.
        head_factor: learning rate of the heads, as a multiple of the model's.
        warmup_steps: steps in which only the heads learn.
        adapters: on the model, or None.
    """

    has_model: ClassVar[bool] = True
    purpose: ClassVar[str] = CAUSAL_LM
    heads_name: ClassVar[str | None] = "Medusa heads"

    def __init__(
        self,
        config: ModelConfig,
        heads: int,
        decay: float,
        coefficient: float,
        head_factor: float,
        warmup_steps: int,
        adapters: AdapterConfig | None = None,
    ) -> None:
        self.depth = heads
        self.coefficients = (1.0, *(coefficient * decay**head for head in range(heads)))
        self.rates: Mapping[str, PartRate] = {
            "model": PartRate(first_step=warmup_steps),
            "heads": PartRate(factor=head_factor),
        }
        self._language_model = LanguageModel(config, adapters)
        self._heads = abstract_heads(config, heads)

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Needs a base model, texts long enough for the last head, and steps for the model to learn in."""
        check_heads(config, "medusa_heads")
        for name in ("head_coefficient", "head_learning_rate_factor"):
            if not getattr(config, name) > 0:
                raise UserError(f"{name} is {getattr(config, name)}; give a positive number")
        if not 0 <= config.joint_warmup_steps < config.training.steps:
            raise UserError(
                f"joint_warmup_steps is {config.joint_warmup_steps}; give 0 or more, and fewer than the "
                f"{config.training.steps} of training.steps, so that the model learns, too"
            )

    @classmethod
    def of(cls, config: "RunConfig") -> "MedusaJoint":
        """The objective of a run."""
        return cls(
            config.model,
            config.medusa_heads,
            config.medusa_decay,
            config.head_coefficient,
            config.head_learning_rate_factor,
            config.joint_warmup_steps,
            config.adapters,
        )

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

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str:
        """How often each guess of each head is right, as `head_accuracy.json` and as a table."""
        return report_heads(*self.parts(params, frozen), self.depth, batches, folder)

    def _targets(self, batch: Batch) -> tuple[Targets, Targets]:
        """The next tokens `[B, T, 1]`, and those of the heads `[B, T, M]`."""
        following = targets_ahead(batch, 1)
        return Targets(*(part[..., None] for part in following)), path_ahead(batch, self.depth)[1]
