"""Products of small matrices with sums in float32, or in float64 where the inputs are; and rows that may be absent."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.implementations import target_platform
from pallas_kernels.precision import accumulation_dtype


def zero_absent(rows: Float[Array, "n D"], mask: Bool[Array, "n 1"]) -> Float[Array, "n D"]:
    """Rows with zeros where they are masked out, whatever they hold there."""
    return jnp.where(mask, rows, jnp.zeros_like(rows))


def matmul(one: Array, other: Array, contract: tuple[int, int]) -> Array:
    """A product of two matrices over the given axes, summed in float32 or better."""
    wide = accumulation_dtype(one.dtype)
    if target_platform() == "cpu":
        # XLA refuses some products of bfloat16 there; in float32 they are the same numbers.
        one, other = one.astype(wide), other.astype(wide)
    exact = jax.lax.Precision.HIGHEST if one.dtype == wide else None
    return jax.lax.dot_general(
        one, other, (((contract[0],), (contract[1],)), ((), ())), precision=exact, preferred_element_type=wide
    )


def memory_matmul(rows: Array, memory: Array, contract: tuple[int, int]) -> Array:
    """A product of rows with a wider memory, which is not rounded: for bfloat16 rows it is cut into three parts."""
    if rows.dtype != jnp.bfloat16:
        return matmul(rows.astype(memory.dtype), memory, contract)
    rest, total = memory, jnp.zeros((), memory.dtype)
    for _ in range(3):
        part = rest.astype(jnp.bfloat16)
        rest = rest - part.astype(memory.dtype)
        total = total + matmul(rows, part, contract)
    return total
