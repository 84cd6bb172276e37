"""AdamW (Loshchilov and Hutter 2019) with linear warm-up, a cosine, and clipping by the global norm."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array

from lin_jax.training.config import OptimizerConfig
from lin_jax.training.parameters import Params

# Matrices by their names: stacked layers add an axis, so that the number of axes says nothing. Norm scales, biases,
# convolution taps and alpha are left alone.
DECAYING = frozenset({"embedding", "kernel", "output", "weight"})


def decays(params: Params) -> Params:
    """Which parameters weight decay acts on, as a tree of booleans."""
    return path_aware_map(lambda path, _: path[-1] in DECAYING, params)


def learning_rate(config: OptimizerConfig, steps: int, step: int | Array) -> Array:
    """The learning rate of step `step` (from 0) out of `steps`.

    It rises to the peak at step `warmup_steps - 1`, and falls along half a cosine to `final_fraction` of it at the
    last step.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = (step + 1) / max(config.warmup_steps, 1)
    fall = (step + 1 - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(fall, 0, 1)))
    share = config.final_fraction + (1 - config.final_fraction) * cosine
    return config.learning_rate * jnp.where(step < config.warmup_steps, rise, share)


class Optimizer(NamedTuple):
    """Turns gradients into updates, and tells the learning rate of a step (from 0)."""

    transformation: optax.GradientTransformation
    schedule: Callable[[Any], Array]


def build_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """The optimiser of a run of `steps` steps."""
    schedule = partial(learning_rate, config, steps)
    parts: list[Any] = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += [
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    ]
    return Optimizer(optax.chain(*parts), schedule)


def widened(tree: Any) -> Any:
    """A tree in float32 or better: gradients add up, and moments live, in no less."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)
