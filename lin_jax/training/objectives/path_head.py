"""A path head on a frozen model: one cell that goes along the text, token by token."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from lin_jax.losses.cross_entropy import (
    Batch,
    Sums,
    Targets,
    distillation_sums,
    inputs_of,
    path_ahead,
    token_sums,
)
from lin_jax.models import CausalModel, ModelConfig, PathHead
from lin_jax.models.params import Params, abstract_path_head, filled
from lin_jax.training.objectives.draft_heads import DraftHeadObjective


class PathHeadObjective(DraftHeadObjective[PathHead]):
    """A path head unrolled for some steps from every position, on its own states and the tokens of the text.

    As in decoding, only the first state is the model's (EAGLE-3, Li et al. 2025, calls that training-time test). With
    `self_steps` the tokens are the head's own drafts, too: where one of its first `self_steps` best guesses is not the
    token of the text, verification would have ended the draft there, and what comes deeper is not learnt.

    A head that guesses some tokens alone learns nothing where another one is to be guessed, and counts as wrong there.

    Args:
        config: the frozen model's.
        width: of the head's state.
        depth: how many depths K.
        decay: of their weights.
        targets: one of HEAD_TARGETS.
        layers: numbers of the layers that the head reads beside the last.
        tokens: the tokens that the head can guess, in ascending order; None for all.
        self_steps: depths at which training follows the head's own guesses; 0 follows the text alone.
    """

    depth_name: ClassVar[str] = "depth"

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        depth: int,
        decay: float,
        targets: str = "text",
        *,
        layers: tuple[int, ...] = (),
        tokens: tuple[int, ...] | None = None,
        self_steps: int = 0,
    ) -> None:
        head = abstract_path_head(config, width, layers, None if tokens is None else len(tokens))
        super().__init__(config, head, depth, decay, targets)
        self._base.aux_layers = layers
        self._width, self._layers, self._tokens = width, layers, tokens
        self._self_steps = self_steps

    def new_heads(self, key: Array, base: CausalModel) -> PathHead:
        """A head cut out of the base model's own."""
        head = PathHead.on(base, self._width, nnx.Rngs(key), layers=self._layers, tokens=self._tokens)
        # Which tokens it guesses is known, and not learnt.
        head.tokens = nnx.data(None)
        return head

    def parts(self, params: Params, frozen: Params) -> tuple[None, PathHead]:
        """No model, and the head."""
        head = filled(self._heads, params)
        if self._tokens is not None:
            head.limit_to(self._tokens)
        return None, head

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[K]` over the tokens of a batch, all of them."""
        return self._sums(params, frozen, batch, 0)

    def training_sums(self, params: Params, frozen: Params, batch: Batch, key: Array) -> Sums:
        """Sums `[K]` as in `sums`, of the positions that the head's own drafts reach."""
        del key
        return self._sums(params, frozen, batch, self._self_steps)

    def _sums(self, params: Params, frozen: Params, batch: Batch, self_steps: int) -> Sums:
        base, head = filled(self._base, frozen), self.parts(params, frozen)[1]
        hidden = jax.lax.stop_gradient(base.hidden(*inputs_of(batch)))
        path, targets = path_ahead(batch, self.depth)
        guesses = head.unrolled(hidden, path)
        learnt = targets.included & _reached(head.named(jnp.argmax(guesses, axis=-1)), path, self_steps)
        if self._targets == "text":
            ids, known = _among(head, targets.ids)
            found = token_sums(guesses, Targets(ids, learnt & known))
        else:
            taught = jax.lax.stop_gradient(base.logits(hidden))
            if head.tokens is not None:
                _, known = _among(head, jnp.argmax(taught, axis=-1))
                taught = taught[..., head.tokens.get_value()]
                learnt &= _ahead(known, self.depth)
            found = distillation_sums(guesses, taught, learnt)
        return found._replace(tokens=jnp.sum(targets.included, axis=(0, 1)))


def _reached(guesses: Int[Array, "B T K"], path: Int[Array, "B T K"], self_steps: int) -> Bool[Array, "B T K"]:
    """Mask of the depths to which the best guesses of the first `self_steps` depths lead along the path."""
    right = guesses[..., :-1] == path[..., 1:]
    right |= jnp.arange(right.shape[-1]) >= self_steps
    return jnp.pad(jnp.cumprod(right, axis=-1, dtype=jnp.int32) > 0, ((0, 0), (0, 0), (1, 0)), constant_values=True)


def _among(head: PathHead, ids: Int[Array, "*batch"]) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
    """Columns of a head's output for tokens, and a mask of the tokens that have one."""
    if head.tokens is None:
        return ids, jnp.ones(ids.shape, bool)
    tokens = head.tokens.get_value()
    columns = jnp.full(head.vocab_size, -1, jnp.int32).at[tokens].set(jnp.arange(len(tokens), dtype=jnp.int32))[ids]
    return jnp.maximum(columns, 0), columns >= 0


def _ahead(mask: Bool[Array, "B T"], depth: int) -> Bool[Array, "B T K"]:
    """A mask of positions, for what is guessed at each depth: the token k + 2 ahead is chosen k + 1 later."""
    shifted = [jnp.pad(mask[:, k + 1 :], ((0, 0), (0, k + 1))) for k in range(depth)]
    return jnp.stack(shifted, axis=-1)
