"""Float32 or better: the type of sums, norms, logits and moments, whatever the type of activations."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar("Arrays")


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which sums over `dtype` are kept: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def quotient(sums: jax.Array, divisor: jax.Array) -> jax.Array:
    """`sums / divisor`, with a gradient for any divisor but 0.

    That of a plain quotient divides by the square, which is zero for a divisor of 1e-23 already: here, the divisor is
    scaled to one before.
    """
    scale = jax.lax.stop_gradient(divisor)
    return (sums / scale) / (divisor / scale)


def upcast(arrays: Arrays) -> Arrays:
    """An array, or a tree of them, in float32 or better."""
    return jax.tree.map(lambda array: array.astype(accumulation_dtype(array.dtype)), arrays)
