"""AdamW (Loshchilov and Hutter 2019), and Muon for matrices, with linear warm-up, a cosine, and clipping."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jaxtyping import Array
from optax import contrib

from lin_jax.errors import UserError
from lin_jax.models.params import Params
from lin_jax.training.objectives import PartRate


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024): momentum of matrices, orthogonalized by Newton-Schulz iterations.

    It is for the weights of linear layers inside a model's layers, low-rank adapters included, each layer's matrix on
    its own. Embeddings, heads, norms, biases and token mixers stay with AdamW. An update of an `I x O` matrix is scaled
    by `0.2 * sqrt(max(I, O))`, so that its root mean square is about that of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), and learning rates and weight decays that suit AdamW suit it too.

    Attributes:
        learning_rate: peak learning rate of these matrices; null is that of the others. Warm-up and cosine are theirs.
        weight_decay: decoupled weight decay of these matrices; null is that of the others. Adapters never decay.
        momentum: decay of the momentum, which looks ahead (Nesterov).
        iterations: Newton-Schulz iterations of a step.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.95
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"optimizer.muon.learning_rate is {self.learning_rate}; give a positive number, or null")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise UserError(f"optimizer.muon.weight_decay is {self.weight_decay}; give 0 or more, or null")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.muon.momentum is {self.momentum}; give 0 or more, and less than 1")
        if self.iterations < 1:
            raise UserError(f"optimizer.muon.iterations is {self.iterations}; give 1 or more")


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
        muon: Muon for the matrices of a model's layers, beside AdamW for all else; null is AdamW for everything, and
            `{}` is Muon with its defaults.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    muon: MuonConfig | None = None

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


# Matrices that Muon may take, by their names, and what on the way to one leaves it to AdamW. Everything else is not two
# dimensions of one map: a row of an embedding is a vector of its own.
_MUON_MATRICES = frozenset({"kernel", "lora_a", "lora_b"})
_NOT_MUON = frozenset({"classifier", "head", "heads", "mixer", "pooler"})
# Root mean square of AdamW's updates in practice (Liu et al. 2025).
_ADAM_RMS = 0.2


def takes_muon(params: Params) -> Params:
    """Marks the parameters that Muon learns, as a tree of booleans: matrices of linear layers inside a model."""

    def matrix(path: tuple[str, ...], _: Any) -> bool:
        inside = not _NOT_MUON & set(path) and not any(name.startswith("embed") for name in path)
        return path[-1] in _MUON_MATRICES and inside

    return path_aware_map(matrix, params)


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
    # In a flat chain: that is how checkpoints name the moments.
    parts += _adamw(config, schedule) if config.muon is None else [_muon_and_adamw(config, config.muon, steps)]
    if rates:
        parts.append(scale_parts(rates))
    return Optimizer(optax.chain(*parts), schedule)


def _adamw(config: OptimizerConfig, schedule: Callable[[Any], Array]) -> list[Any]:
    return [
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    ]


def _muon_and_adamw(config: OptimizerConfig, muon: MuonConfig, steps: int) -> optax.GradientTransformation:
    own = replace(
        config,
        learning_rate=config.learning_rate if muon.learning_rate is None else muon.learning_rate,
        weight_decay=config.weight_decay if muon.weight_decay is None else muon.weight_decay,
    )

    def last_two(params: Params) -> Params:
        """Axes of each matrix; those before them, of stacked layers, are matrices of their own."""
        axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree.map(lambda _: axes, params)

    orthogonal = optax.chain(
        contrib.scale_by_muon(
            ns_steps=muon.iterations, beta=muon.momentum, eps=config.eps, weight_dimension_numbers=last_two
        ),
        scale_to_adam(),
        optax.add_decayed_weights(own.weight_decay, mask=decays),
        optax.scale_by_learning_rate(partial(learning_rate, own, steps)),
    )

    def kinds(params: Params) -> Params:
        return jax.tree.map(lambda matrix: "muon" if matrix else "adamw", takes_muon(params))

    others = optax.chain(*_adamw(config, partial(learning_rate, config, steps)))
    return optax.partition({"muon": orthogonal, "adamw": others}, kinds)


def scale_to_adam() -> optax.GradientTransformation:
    """Scales orthogonal updates `[..., I, O]` to the root mean square that AdamW's have, whatever their sizes."""

    def scaled(updates: Params, _: Params | None) -> Params:
        return jax.tree.map(lambda leaf: leaf * (_ADAM_RMS * max(leaf.shape[-2:]) ** 0.5), updates)

    return optax.stateless(scaled)


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
