"""Sums of logarithms of decay, of which differences are exponentiated.

A difference of two long sums is only as exact as the sums are. So a logarithm is taken apart: multiples of 2^-12, whose
sums below 4,096 float32 holds exactly, and what is left of it, whose sums stay small.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Coarse parts are multiples of its inverse.
_STEPS = 2.0**12


class SplitSums(NamedTuple):
    """Two numbers whose sum is a sum of logarithms of decay.

    Attributes:
        coarse: sums of multiples of 2^-12.
        fine: sums of what is left.
    """

    coarse: Float[Array, "*any"]
    fine: Float[Array, "*any"]

    @classmethod
    def of(cls, sums: Float[Array, "*any"]) -> "SplitSums":
        """Sums that have been taken in one piece, as exact as these are."""
        return cls(sums, jnp.zeros_like(sums))

    @property
    def total(self) -> Float[Array, "*any"]:
        """The sum itself."""
        return self.coarse + self.fine


def parts_of(decays: Float[Array, "*any"]) -> SplitSums:
    """Logarithms taken apart; the gradient is that of the fine parts."""
    coarse = jax.lax.stop_gradient(jnp.round(decays * _STEPS) / _STEPS)
    return SplitSums(coarse, decays - coarse)


def lag(queries: SplitSums, keys: SplitSums) -> Float[Array, "*any"]:
    """Differences of sums, which are as exact as they are small."""
    return (queries.coarse - keys.coarse) + (queries.fine - keys.fine)


def between(queries: SplitSums, keys: SplitSums, mask: Bool[Array, "*#batch T S"]) -> Float[Array, "*batch K 1 T S"]:
    """Factors of pairs, one where the mask has none, from sums `[..., T, K]` of queries and `[..., S, K]` of keys."""
    asked = SplitSums(*(jnp.swapaxes(part, -1, -2)[..., :, None] for part in queries))
    held = SplitSums(*(jnp.swapaxes(part, -1, -2)[..., None, :] for part in keys))
    # Masked before the exponential: pairs that do not count would overflow, and their gradients with them.
    return jnp.exp(jnp.where(mask[..., None, :, :], lag(asked, held), 0))[..., None, :, :]
