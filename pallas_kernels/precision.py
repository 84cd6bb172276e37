"""Float32 or better: the type of sums, norms, logits and moments, whatever the type of activations."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar("Arrays")


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which sums over `dtype` are kept: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def upcast(arrays: Arrays) -> Arrays:
    """An array, or a tree of them, in float32 or better."""
    return jax.tree.map(lambda array: array.astype(accumulation_dtype(array.dtype)), arrays)
