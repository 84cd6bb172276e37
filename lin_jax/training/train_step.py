"""One optimiser step, as one compiled function of the state and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lin_jax.losses.cross_entropy import Batch, Sums
from lin_jax.models.params import Params
from lin_jax.training.distributed.partitioning import Shardings
from lin_jax.training.monitoring.spike_detection import (
    DEFAULT_LOSS_SPIKES,
    LossHistory,
    LossSpikesConfig,
    StepHealth,
    check_step,
)
from lin_jax.training.objectives import Objective, training_sums
from lin_jax.training.optimizer import Optimizer
from pallas_kernels.precision import upcast


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        params: parameters that learn.
        optimizer: the optimiser's state, with moments in float32 or better.
        step: steps taken so far.
        key: what random draws of step n come from, by `fold_in(key, n)`.
        history: losses and gradient norms of earlier steps, to tell when one goes wrong.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    key: Key[Array, ""]
    history: LossHistory

    @classmethod
    def new(
        cls, params: Params, optimizer: Optimizer, key: Array, window: int = DEFAULT_LOSS_SPIKES.window
    ) -> "TrainState":
        """The state before the first step, which remembers `window` of them."""
        moments = optimizer.transformation.init(upcast(params))
        return cls(params, moments, jnp.zeros((), jnp.int32), key, LossHistory.new(window))


class StepMetrics(NamedTuple):
    """Metrics of a step.

    Attributes:
        loss: weighted mean losses, before the update.
        grad_norm: global norm of the gradient, before it is clipped.
        learning_rate: of this step.
        sums: sums over the tokens of the batch, for each of the objective's K predictors.
        health: whether loss and gradient are as they should be, and the update was made.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    sums: Sums
    health: StepHealth


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    gradient_accumulation: int = 1,
    spikes: LossSpikesConfig = DEFAULT_LOSS_SPIKES,
    *,
    shardings: Shardings | None = None,
    state: TrainState | None = None,
) -> Any:
    """The jitted `(state, frozen, batch) -> (state, figures)`; the old state's memory is reused for the new one.

    Args:
        objective: what to learn.
        optimizer: turns gradients into updates.
        gradient_accumulation: how many parts the rows of a batch are taken in; must divide them.
        spikes: which updates are left out.
        shardings: where the new state is to lie; None leaves it to the compiler.
        state: a state, or its shapes, for the placement.
    """
    where = None if shardings is None else (shardings.tree(state), shardings.whole)
    return jax.jit(
        partial(_step, objective, optimizer, gradient_accumulation, spikes), donate_argnums=0, out_shardings=where
    )


def _step(
    objective: Objective,
    optimizer: Optimizer,
    gradient_accumulation: int,
    spikes: LossSpikesConfig,
    state: TrainState,
    frozen: Params,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    key = jax.random.fold_in(state.key, state.step)
    loss, sums, gradients = accumulate_gradients(objective, gradient_accumulation, state.params, frozen, batch, key)
    grad_norm = optax.tree.norm(gradients)
    health, remembered = check_step(spikes, state.history, state.step + 1, loss, grad_norm)
    wide = upcast(state.params)
    updates, moments = optimizer.transformation.update(gradients, state.optimizer, wide)
    params = jax.tree.map(lambda old, own, update: (own + update).astype(old.dtype), state.params, wide, updates)
    # A step without finite numbers, or one that is not to be trusted, must not spoil what is worth saving.
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(health.left_out, old, new), (params, moments), (state.params, state.optimizer)
    )
    # The schedule counts updates, as the optimiser does.
    rate = optimizer.schedule(state.step - state.history.counts.left_out)
    figures = StepMetrics(loss, grad_norm, rate, sums, health)
    return TrainState(params, moments, state.step + 1, state.key, remembered), figures


def accumulate_gradients(
    objective: Objective, parts: int, params: Params, frozen: Params, batch: Batch, key: Array | None = None
) -> tuple[Float[Array, ""], Sums, Params]:
    """Loss, sums and gradient of a batch `[B, ...]`, a part of its rows at a time.

    Every part is divided by the targets of the whole batch, so that the parts simply add up. Every part has a key of
    its own for what the objective draws; without a key it draws nothing.
    """
    weights = jnp.asarray(objective.coefficients) / jnp.maximum(objective.counts(batch), 1)

    def part_loss(params: Params, part: tuple[Batch, Array | None]) -> tuple[Array, Sums]:
        sums = training_sums(objective, params, frozen, *part)
        return jnp.sum(weights.astype(sums.loss.dtype) * sums.loss), sums

    def add(totals: Any, part: tuple[Batch, Array | None]) -> tuple[Any, None]:
        (loss, sums), gradients = jax.value_and_grad(part_loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, totals, (loss, sums, upcast(gradients))), None

    if parts == 1:
        # No sums to carry through a loop, and no zeros to begin them with.
        part_key = None if key is None else jax.random.split(key, 1)[0]
        (loss, sums), gradients = jax.value_and_grad(part_loss, has_aux=True)(params, (dict(batch), part_key))
        return loss, sums, upcast(gradients)
    # Every part takes rows from all over the batch, and so from every device that holds some.
    stacked = jax.tree.map(lambda rows: jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0), dict(batch))
    each = stacked, None if key is None else jax.random.split(key, parts)
    zeros = _zeros(part_loss, params, jax.tree.map(lambda rows: rows[0], each))
    totals, _ = jax.lax.scan(add, zeros, each)
    return totals


def _zeros(part_loss: Callable[..., Any], params: Params, part: Any) -> Any:
    """Zeros for the sums to start from."""
    loss, sums = jax.eval_shape(part_loss, params, part)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, sums, jax.eval_shape(upcast, params)))
