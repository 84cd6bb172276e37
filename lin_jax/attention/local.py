"""The local branch: quadratic attention inside a group, by a score function of q·k."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ScoreFunction = Callable[[Array], Array]


def relu_squared(scores: Array) -> Array:
    """`relu(s)^2`, the score of FLASH (Hua et al. 2022) and of the paper's LLaMA, GPT-2 and T5 recipes."""
    return jnp.square(jax.nn.relu(scores))


def yoso_expectation(scores: Array) -> Array:
    """Expected collisions of 8-bit hashes of unit vectors (YOSO, Zeng et al. 2021), `(1 - arccos(0.98 s) / pi)^8`."""
    return (1 - jnp.arccos(0.98 * jnp.clip(scores, -1, 1)) / jnp.pi) ** 8


LOCAL_SCORES: dict[str, ScoreFunction] = {"relu_squared": relu_squared, "yoso": yoso_expectation}


def local_weights(
    scores: Float[Array, "*batch K R T S"], same_group: Bool[Array, "*#batch T S"], score: ScoreFunction
) -> Float[Array, "*batch K R T S"]:
    """Weights of the local branch: `score(q·k)` for pairs of one group, zero elsewhere."""
    return jnp.where(same_group[..., None, None, :, :], score(scores), 0)
