"""One optimiser step, as one compiled function of the state and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from lin_jax.evaluation.targets import Batch, Sums
from lin_jax.training.objectives import Objective
from lin_jax.training.optimizer import Optimizer
from lin_jax.training.parameters import Params, widened


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        params: parameters that learn.
        optimizer: the optimiser's state, with moments in float32 or better.
        step: steps taken so far.
        key: what random draws of step n come from, by `fold_in(key, n)`.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    key: Key[Array, ""]

    @classmethod
    def new(cls, params: Params, optimizer: Optimizer, key: Array) -> "TrainState":
        """The state before the first step."""
        return cls(params, optimizer.transformation.init(widened(params)), jnp.zeros((), jnp.int32), key)


class Figures(NamedTuple):
    """What a step reports.

    Attributes:
        loss: weighted mean losses, before the update.
        grad_norm: global norm of the gradient, before it is clipped.
        learning_rate: of this step.
        finite: whether both are finite; where they are not, the update was left out.
        sums: sums over the tokens of the batch, for each of the objective's K predictors.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    sums: Sums


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Figures]]


def make_step(objective: Objective, optimizer: Optimizer, accumulation: int = 1) -> Any:
    """The jitted `(state, frozen, batch) -> (state, figures)`; the old state's memory is reused for the new one.

    Args:
        objective: what to learn.
        optimizer: turns gradients into updates.
        accumulation: how many parts the rows of a batch are taken in; must divide them.
    """
    return jax.jit(partial(_step, objective, optimizer, accumulation), donate_argnums=0)


def _step(
    objective: Objective,
    optimizer: Optimizer,
    accumulation: int,
    state: TrainState,
    frozen: Params,
    batch: Batch,
) -> tuple[TrainState, Figures]:
    loss, sums, gradients = accumulate(objective, accumulation, state.params, frozen, batch)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    wide = widened(state.params)
    updates, moments = optimizer.transformation.update(gradients, state.optimizer, wide)
    params = jax.tree.map(lambda old, own, update: (own + update).astype(old.dtype), state.params, wide, updates)
    # A step without finite numbers must not spoil what is worth saving.
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, moments), (state.params, state.optimizer)
    )
    figures = Figures(loss, grad_norm, optimizer.schedule(state.step), finite, sums)
    return TrainState(params, moments, state.step + 1, state.key), figures


def accumulate(
    objective: Objective, parts: int, params: Params, frozen: Params, batch: Batch
) -> tuple[Float[Array, ""], Sums, Params]:
    """Loss, sums and gradient of a batch `[B, ...]`, a part of its rows at a time.

    Every part is divided by the targets of the whole batch, so that the parts simply add up.
    """
    weights = jnp.asarray(objective.coefficients) / jnp.maximum(objective.counts(batch), 1)

    def part_loss(params: Params, part: Batch) -> tuple[Array, Sums]:
        sums = objective.sums(params, frozen, part)
        return jnp.sum(weights.astype(sums.loss.dtype) * sums.loss), sums

    def add(totals: Any, part: Batch) -> tuple[Any, None]:
        (loss, sums), gradients = jax.value_and_grad(part_loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, totals, (loss, sums, widened(gradients))), None

    stacked = jax.tree.map(lambda rows: jnp.reshape(rows, (parts, -1, *rows.shape[1:])), dict(batch))
    zeros = _zeros(part_loss, params, jax.tree.map(lambda rows: rows[0], stacked))
    totals, _ = jax.lax.scan(add, zeros, stacked)
    return totals


def _zeros(part_loss: Callable[..., Any], params: Params, part: Batch) -> Any:
    """Zeros for the sums to start from."""
    loss, sums = jax.eval_shape(part_loss, params, part)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, sums, jax.eval_shape(widened, params)))
