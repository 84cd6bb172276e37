"""A path head on a frozen model: one cell that goes along the text, token by token."""

from typing import ClassVar

from flax import nnx
from jaxtyping import Array

from lin_jax.models import CausalModel, ModelConfig, PathHead
from lin_jax.models.params import abstract_path_head
from lin_jax.training.objectives.draft_heads import DraftHeadObjective


class PathHeadObjective(DraftHeadObjective[PathHead]):
    """A path head unrolled for some steps from every position, on its own states and the tokens of the text.

    As in decoding, only the first state is the model's (EAGLE-3, Li et al. 2025, calls that training-time test).
    """

    depth_name: ClassVar[str] = "depth"

    def __init__(self, config: ModelConfig, width: int, depth: int, decay: float, targets: str = "text") -> None:
        super().__init__(config, abstract_path_head(config, width), depth, decay, targets)
        self._width = width

    def new_heads(self, key: Array, base: CausalModel) -> PathHead:
        """A head cut out of the base model's own."""
        return PathHead.on(base, self._width, nnx.Rngs(key))
