"""The linear branch: sums of `phi(q)·phi(k) v` over pairs and through a memory, and their normalisation."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lin_jax.attention.feature_maps import FeatureMap
from lin_jax.attention.pairs import unit
from pallas_kernels.windows.normaliser import divided

Finish = Callable[[Array], Array]


def divided_above_floor(sums: Float[Array, "*batch K R E_1"]) -> Float[Array, "*batch K R E"]:
    """The same for weights that may be negative by chance: the normaliser counts at least 0.01."""
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1e-2)


def root_mean_square(sums: Float[Array, "*batch K R E"]) -> Float[Array, "*batch K R E"]:
    """Sums of all heads together scaled to a root mean square of one (NormAttention, Qin et al. 2022)."""
    mean = jnp.mean(jnp.square(sums), axis=(-3, -2, -1), keepdims=True)
    return sums * jax.lax.rsqrt(mean + 1e-6)


FINISHES: dict[str, Finish] = {
    "divided": divided,
    "divided_above_floor": divided_above_floor,
    "root_mean_square": root_mean_square,
    "unit": unit,
}


class LinearBranch(nnx.Module):
    """Linear attention by a feature map.

    Args:
        features: the feature map phi.
        reach: whether keys of the query's own group take part (`all`), or of earlier groups alone (`earlier`).
        finish: a name of `FINISHES`, what becomes of the sums; None leaves them.
    """

    def __init__(
        self, features: FeatureMap, *, reach: Literal["all", "earlier"], finish: str | None = None, scale: float = 1.0
    ) -> None:
        self.features = features
        self.reach = reach
        self.finish = finish
        self.scale = scale

    @property
    def normalised(self) -> bool:
        """True where sums have one more element than values, the normaliser."""
        return self.finish is not None and self.finish.startswith("divided")

    def extended(self, values: Float[Array, "*batch S K E"]) -> Float[Array, "*batch S K E_1"]:
        """Values as they are summed: with a one appended where there is a normaliser."""
        return (
            jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, 1),), constant_values=1) if self.normalised else values
        )

    def weights(self, queries: Array, keys: Array, mask: Bool[Array, "*#batch T S"]) -> Float[Array, "*batch K R T S"]:
        """`phi(q)·phi(k)` of the pairs that the mask allows, zero elsewhere."""
        return jnp.where(mask[..., None, None, :, :], self._scaled(self.features.scores(queries, keys)), 0)

    def fold(self, keys: Array, values: Array, included: Bool[Array, "*#batch S"] | None = None) -> Array:
        """The addition of tokens to the memory."""
        return self.features.fold(keys, self.extended(values), included)

    def recall(self, queries: Array, memory: Array) -> Array:
        """The values that queries read from the memory."""
        return self._scaled(self.features.recall(queries, memory))

    def finished(self, sums: Array) -> Array:
        """The branch's outputs `[..., K, R, E]`."""
        return sums if self.finish is None else FINISHES[self.finish](sums)

    def _scaled(self, sums: Array) -> Array:
        return sums if self.scale == 1 else sums * self.scale
