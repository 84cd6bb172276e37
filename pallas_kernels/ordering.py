"""Order of computations, where the compiler would choose another one: dependences that it does not see through.

An optimization barrier does not do: XLA removes it before it joins loops and decides which buffers to copy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bits of one of the many NaN: a number that nobody computes.
_NO_NUMBER = 0x7FABCDEF


def truth(x: Array) -> Bool[Array, ""]:
    """True, which the compiler does not know before x is computed."""
    first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.int32)
    return first != _NO_NUMBER


def computed(x: Array) -> Array:
    """The same array, computed before what reads it: XLA would compute an activation anew for every output.

    A condition keeps the two apart; a barrier is gone before XLA joins loops.
    """
    return jax.lax.cond(truth(x), lambda x: x, jnp.zeros_like, x)


def known_after(numbers: Int[Array, "*shape"], *done: Array) -> Int[Array, "*shape"]:
    """The same numbers, which are known only when other arrays are computed.

    A write to places that are known after all reads of the old array changes it where it lies; else XLA copies it.
    """
    for each in done:
        numbers = jnp.where(truth(each), numbers, 0)
    return numbers
