"""The local branch: quadratic attention inside a group, by a score function of q·k."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lin_jax.attention.pairs import unit
from pallas_kernels.pairs import pair_scores

ScoreFunction = Callable[[Array], Array]


def relu_squared(scores: Array) -> Array:
    """`relu(s)^2`, the score of FLASH (Hua et al. 2022) and of the paper's LLaMA, GPT-2 and T5 recipes."""
    return jnp.square(jax.nn.relu(scores))


def laplace(scores: Array) -> Array:
    """A smooth, bounded stand-in for `relu(s)^2` (Ma et al. 2023): a normal distribution function of mean `1/2^0.5`."""
    deviation = math.sqrt(1 / (4 * math.pi))
    return (1 + jax.scipy.special.erf((scores - math.sqrt(0.5)) / (deviation * math.sqrt(2)))) / 2


def yoso_expectation(scores: Array) -> Array:
    """Expected collisions of 8-bit hashes of unit vectors (YOSO, Zeng et al. 2021), `(1 - arccos(0.98 s) / pi)^8`."""
    return (1 - jnp.arccos(0.98 * jnp.clip(scores, -1, 1)) / jnp.pi) ** 8


LOCAL_SCORES: dict[str, ScoreFunction] = {"laplace": laplace, "relu_squared": relu_squared, "yoso": yoso_expectation}


@dataclass(frozen=True)
class LocalBranch:
    """Weights of pairs inside a group.

    Attributes:
        score: turns q·k into a weight; None is softmax over the group.
        unit: scale queries and keys to length one first (where the mixer has not done so).
        scale: factor of q·k.
        bias: whether a relative bias joins the scores, or the weights.
        size: read only the first `size` features of queries and keys; None reads all.
    """

    score: ScoreFunction | None
    unit: bool = False
    scale: float = 1.0
    bias: Literal["scores", "weights"] = "weights"
    size: int | None = None

    def weights(
        self,
        queries: Float[Array, "*batch T K R D"],
        keys: Float[Array, "*batch S K D"],
        mask: Bool[Array, "*#batch T S"],
        bias: Float[Array, "*#batch K R T S"] | None,
    ) -> Float[Array, "*batch K R T S"]:
        """Weights of the pairs that the mask allows, zero elsewhere."""
        queries, keys = queries[..., : self.size], keys[..., : self.size]
        if self.unit:
            queries, keys = unit(queries), unit(keys)
        scores = pair_scores(queries, keys)
        if self.scale != 1:
            scores = scores * self.scale
        if bias is not None and self.bias == "scores":
            scores = scores + bias
        allowed = mask[..., None, None, :, :]
        if self.score is None:
            masked = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
            return jnp.where(allowed, jax.nn.softmax(masked, axis=-1), 0)
        weights = self.score(scores)
        if bias is not None and self.bias == "weights":
            weights = weights + bias
        return jnp.where(allowed, weights, 0)
