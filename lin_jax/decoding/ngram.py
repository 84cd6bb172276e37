"""Finding an earlier occurrence of the last few tokens, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def latest_continuation(
    tokens: Int[Array, "B C"], length: Int[Array, " B"], count: int, longest: int
) -> Int[Array, "B M"]:
    """What followed the latest earlier occurrence of the last n tokens, for the largest n <= `longest` that has one.

    Where the copy runs into the end of the text it goes on into its own beginning, as a text that repeats itself would.

    Args:
        tokens: `[B, C]` texts, padded on the right.
        length: `[B]` their lengths, at least 1.
        count: tokens to copy.
        longest: largest n.

    Returns:
        `[B, count]` tokens, -1 in rows whose last token never occurred before.
    """
    index = jnp.arange(tokens.shape[1])
    earlier = index < length[:, None] - 1
    match, latest = earlier, jnp.full(length.shape, -1)
    for back in range(longest):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens.shape[1]]
        match = match & (shifted == last) & (length > back)[:, None]
        found = jnp.max(jnp.where(match, index, -1), axis=1)
        latest = jnp.where(found >= 0, found, latest)
    period = jnp.maximum(length - 1 - latest, 1)
    source = latest[:, None] + 1 + jnp.arange(count) % period[:, None]
    copied = jnp.take_along_axis(tokens, jnp.minimum(source, tokens.shape[1] - 1), axis=1)
    return jax.lax.select(jnp.broadcast_to((latest >= 0)[:, None], copied.shape), copied, jnp.full_like(copied, -1))
