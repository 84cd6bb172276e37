"""Medusa heads on a frozen model: a head for every token after the next one."""

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Array

from lin_jax.models import CausalModel, MedusaHeads, ModelConfig
from lin_jax.training.objectives.frozen_base import FrozenBase, check_heads
from lin_jax.training.parameters import abstract_heads

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


class Medusa(FrozenBase[MedusaHeads]):
    """Medusa-1 (Cai et al. 2024): head m (from 0) predicts the token m + 2 after its position."""

    heads_name: ClassVar[str | None] = "Medusa heads"
    depth_name: ClassVar[str] = "head"

    def __init__(self, config: ModelConfig, heads: int, decay: float, targets: str = "text") -> None:
        super().__init__(config, abstract_heads(config, heads), heads, decay, targets)

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Needs a base model and texts long enough for the last head."""
        check_heads(config, "medusa_heads")

    @classmethod
    def of(cls, config: "RunConfig") -> "Medusa":
        """The objective of a run."""
        return cls(config.model, config.medusa_heads, config.medusa_decay, config.head_targets)

    def new_heads(self, key: Array, base: CausalModel) -> MedusaHeads:
        """Copies of the base model's own head."""
        return MedusaHeads.on(base, self.depth)
