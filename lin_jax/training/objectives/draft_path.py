"""A path head on a frozen model: one cell that goes along the text, token by token."""

from typing import TYPE_CHECKING, ClassVar

from flax import nnx
from jaxtyping import Array

from lin_jax.models import CausalModel, ModelConfig, PathHead
from lin_jax.training.objectives.frozen_base import FrozenBase, check_heads
from lin_jax.training.parameters import abstract_path_head

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


class DraftPath(FrozenBase[PathHead]):
    """A path head unrolled for some steps from every position, on its own states and the tokens of the text.

    As in decoding, only the first state is the model's (EAGLE-3, Li et al. 2025, calls that training-time test).
    """

    heads_name: ClassVar[str | None] = "a path head"
    depth_name: ClassVar[str] = "depth"

    def __init__(self, config: ModelConfig, width: int, depth: int, decay: float, targets: str = "text") -> None:
        super().__init__(config, abstract_path_head(config, width), depth, decay, targets)
        self._width = width

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Needs a base model and texts long enough for the last step."""
        check_heads(config, "path_depth")

    @classmethod
    def of(cls, config: "RunConfig") -> "DraftPath":
        """The objective of a run; raises a `UserError` if the head would be wider than the model."""
        return cls(config.model, config.path_width, config.path_depth, config.path_decay, config.head_targets)

    def new_heads(self, key: Array, base: CausalModel) -> PathHead:
        """A head cut out of the base model's own."""
        return PathHead.on(base, self._width, nnx.Rngs(key))
