"""One optimiser step, as one compiled function of the state and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lin_jax.evaluation.targets import Batch, Sums
from lin_jax.training.objectives import Objective
from lin_jax.training.optimizer import Optimizer
from lin_jax.training.parameters import Params, widened
from lin_jax.training.placement import Placement
from lin_jax.training.watch import DEFAULT_WATCH, Verdict, Watch, WatchConfig, judge


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        params: parameters that learn.
        optimizer: the optimiser's state, with moments in float32 or better.
        step: steps taken so far.
        key: what random draws of step n come from, by `fold_in(key, n)`.
        watch: what is remembered of earlier steps, to tell when one goes wrong.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    key: Key[Array, ""]
    watch: Watch

    @classmethod
    def new(cls, params: Params, optimizer: Optimizer, key: Array, window: int = DEFAULT_WATCH.window) -> "TrainState":
        """The state before the first step, which remembers `window` of them."""
        moments = optimizer.transformation.init(widened(params))
        return cls(params, moments, jnp.zeros((), jnp.int32), key, Watch.new(window))


class Figures(NamedTuple):
    """What a step reports.

    Attributes:
        loss: weighted mean losses, before the update.
        grad_norm: global norm of the gradient, before it is clipped.
        learning_rate: of this step.
        sums: sums over the tokens of the batch, for each of the objective's K predictors.
        verdict: whether loss and gradient are as they should be, and the update was made.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    sums: Sums
    verdict: Verdict


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Figures]]


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    accumulation: int = 1,
    watch: WatchConfig = DEFAULT_WATCH,
    *,
    placement: Placement | None = None,
    state: TrainState | None = None,
) -> Any:
    """The jitted `(state, frozen, batch) -> (state, figures)`; the old state's memory is reused for the new one.

    Args:
        objective: what to learn.
        optimizer: turns gradients into updates.
        accumulation: how many parts the rows of a batch are taken in; must divide them.
        watch: which updates are left out.
        placement: where the new state is to lie; None leaves it to the compiler.
        state: a state, or its shapes, for the placement.
    """
    where = None if placement is None else (placement.tree(state), placement.whole)
    return jax.jit(partial(_step, objective, optimizer, accumulation, watch), donate_argnums=0, out_shardings=where)


def _step(
    objective: Objective,
    optimizer: Optimizer,
    accumulation: int,
    watch: WatchConfig,
    state: TrainState,
    frozen: Params,
    batch: Batch,
) -> tuple[TrainState, Figures]:
    loss, sums, gradients = accumulate(objective, accumulation, state.params, frozen, batch)
    grad_norm = optax.tree.norm(gradients)
    verdict, remembered = judge(watch, state.watch, state.step + 1, loss, grad_norm)
    wide = widened(state.params)
    updates, moments = optimizer.transformation.update(gradients, state.optimizer, wide)
    params = jax.tree.map(lambda old, own, update: (own + update).astype(old.dtype), state.params, wide, updates)
    # A step without finite numbers, or one that is not to be trusted, must not spoil what is worth saving.
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(verdict.left_out, old, new), (params, moments), (state.params, state.optimizer)
    )
    # The schedule counts updates, as the optimiser does.
    rate = optimizer.schedule(state.step - state.watch.counts.left_out)
    figures = Figures(loss, grad_norm, rate, sums, verdict)
    return TrainState(params, moments, state.step + 1, state.key, remembered), figures


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

    # Every part takes rows from all over the batch, and so from every device that holds some.
    stacked = jax.tree.map(lambda rows: jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0), dict(batch))
    zeros = _zeros(part_loss, params, jax.tree.map(lambda rows: rows[0], stacked))
    totals, _ = jax.lax.scan(add, zeros, stacked)
    return totals


def _zeros(part_loss: Callable[..., Any], params: Params, part: Batch) -> Any:
    """Zeros for the sums to start from."""
    loss, sums = jax.eval_shape(part_loss, params, part)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, sums, jax.eval_shape(widened, params)))
