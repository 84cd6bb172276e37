"""AdamW (Loshchilov and Hutter 2019) with linear warm-up, a cosine, and clipping by the global norm."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array

from lin_jax.errors import UserError
from lin_jax.models.params import Params
from lin_jax.training.objectives import PartRate


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine after it.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up; 0 starts at the peak.
        min_lr_ratio: learning rate of the last step, as a share of the peak.
        weight_decay: decoupled weight decay of matrices; norms, biases, filters and scalars never decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root of the second moment.
        max_grad_norm: largest global norm of the gradient; null does not clip.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; give a positive number")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}; give 0 or more steps")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optimizer.min_lr_ratio is {self.min_lr_ratio}; give a share between 0 and 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(
                f"optimizer.max_grad_norm is {self.max_grad_norm}; give a positive number, or null not to clip"
            )


# Matrices by their names: stacked layers add an axis, so that the number of axes says nothing. Norm scales, biases,
# convolution taps and alpha are left alone.
DECAYING = frozenset({"embedding", "inner", "kernel", "outer", "output", "projection", "weight"})


def decays(params: Params) -> Params:
    """Marks the parameters that weight decay acts on, as a tree of booleans; random projections never decay."""
    return path_aware_map(lambda path, _: path[-1] in DECAYING and "mixer" not in path, params)


def learning_rate(config: OptimizerConfig, steps: int, step: int | Array) -> Array:
    """The learning rate of step `step` (from 0) out of `steps`.

    It rises to the peak at step `warmup_steps - 1`, and falls along half a cosine to `min_lr_ratio` of it at the
    last step.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = (step + 1) / max(config.warmup_steps, 1)
    fall = (step + 1 - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(fall, 0, 1)))
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine
    return config.learning_rate * jnp.where(step < config.warmup_steps, rise, share)


class Optimizer(NamedTuple):
    """Turns gradients into updates, and tells the learning rate of a step (from 0)."""

    transformation: optax.GradientTransformation
    schedule: Callable[[Any], Array]


def build_optimizer(config: OptimizerConfig, steps: int, rates: Mapping[str, PartRate] | None = None) -> Optimizer:
    """The optimiser of a run of `steps` steps, and how fast the parts of the parameters learn, if not all alike."""
    schedule = partial(learning_rate, config, steps)
    parts: list[Any] = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    parts += [
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    ]
    if rates:
        parts.append(scale_parts(rates))
    return Optimizer(optax.chain(*parts), schedule)


def scale_parts(rates: Mapping[str, PartRate]) -> optax.GradientTransformation:
    """Scales the updates of each part of the parameters (a dictionary of trees) by a factor, zero in its first steps.

    Moments gather in those steps, too, so that the first that counts is of an ordinary size.
    """

    def init(params: Params) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        scaled = {}
        for name, tree in updates.items():
            factor = jnp.where(state.count < rates[name].first_step, 0.0, rates[name].factor)
            scaled[name] = jax.tree.map(lambda leaf, factor=factor: leaf * factor.astype(leaf.dtype), tree)
        return scaled, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
