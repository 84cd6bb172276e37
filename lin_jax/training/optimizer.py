"""AdamW (Loshchilov and Hutter 2019) with linear warm-up, a cosine, and clipping by the global norm."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array

from lin_jax.training.config import OptimizerConfig
from lin_jax.training.objectives import PartRate
from lin_jax.training.parameters import Params

# Matrices by their names: stacked layers add an axis, so that the number of axes says nothing. Norm scales, biases,
# convolution taps and alpha are left alone.
DECAYING = frozenset({"embedding", "inner", "kernel", "outer", "output", "projection", "weight"})


def decays(params: Params) -> Params:
    """Which parameters weight decay acts on, as a tree of booleans; a mixer's random projections are not learnt."""
    return path_aware_map(lambda path, _: path[-1] in DECAYING and "mixer" not in path, params)


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


def build_optimizer(config: OptimizerConfig, steps: int, rates: Mapping[str, PartRate] | None = None) -> Optimizer:
    """The optimiser of a run of `steps` steps, and how fast the parts of the parameters learn, if not all alike."""
    schedule = partial(learning_rate, config, steps)
    parts: list[Any] = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
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
