"""Medusa heads on a frozen model: a head for every token after the next one."""

from typing import ClassVar

from jaxtyping import Array

from lin_jax.models import CausalModel, MedusaHeads, ModelConfig
from lin_jax.models.params import abstract_heads
from lin_jax.training.objectives.draft_heads import DraftHeadObjective


class Medusa(DraftHeadObjective[MedusaHeads]):
    """Medusa-1 (Cai et al. 2024): head m (from 0) predicts the token m + 2 after its position."""

    depth_name: ClassVar[str] = "head"

    def __init__(self, config: ModelConfig, heads: int, decay: float, targets: str = "text") -> None:
        super().__init__(config, abstract_heads(config, heads), heads, decay, targets)

    def new_heads(self, key: Array, base: CausalModel) -> MedusaHeads:
        """Copies of the base model's own head."""
        return MedusaHeads.on(base, self.depth)
