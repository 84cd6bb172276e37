"""One normaliser for near pairs, by softmax, and for sums that are taken with features."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pairs import pair_scores, weighted_values
from pallas_kernels.precision import quotient, upcast
from pallas_kernels.windows.rows import Pairs


def extended(values: Float[Array, "*batch S K E"]) -> Float[Array, "*batch S K E_1"]:
    """Values with a one behind them, whose sum is the normaliser, in float32 or better."""
    room = ((0, 0),) * (values.ndim - 1) + ((0, 1),)
    return jnp.pad(upcast(values), room, constant_values=1)


def divided(sums: Float[Array, "*batch K R E_1"]) -> Float[Array, "*batch K R E"]:
    """Sums divided by the last of them, the normaliser; no weights at all give zero, not NaN."""
    normaliser = sums[..., -1:]
    return quotient(sums[..., :-1], jnp.where(normaliser == 0, 1, normaliser))


def normalised(
    queries: Float[Array, "*batch T K R D"],
    pairs: Pairs,
    far: Float[Array, "*batch T K R E_1"],
    log_scale: Float[Array, "*batch T K R"],
    scale: float,
) -> Float[Array, "*batch T K R E"]:
    """Softmax of near pairs, and sums of far ones and of the memory, under one normaliser.

    Args:
        queries: whose outputs.
        pairs: near ones count.
        far: sums over all that is far, that of ones behind those of values.
        log_scale: logarithms of what these must be multiplied by.
        scale: factor of q·k.
    """
    scores = pair_scores(queries, pairs.tokens.keys) * scale
    if pairs.bias is not None:
        scores = scores + pairs.bias
    allowed, lowest = pairs.masks.near[..., None, None, :, :], jnp.finfo(scores.dtype).min
    largest = jnp.moveaxis(jnp.max(jnp.where(allowed, scores, lowest), axis=-1), -1, -3)
    total = far[..., -1]
    seen = jnp.where(total > 0, log_scale + jnp.log(jnp.where(total > 0, total, 1)), lowest)
    # Nothing is larger than one but for what is the largest, whose choice does not change the outputs.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(largest, seen), lowest / 2))
    # Masked before the exponential, whose gradient would not be a number otherwise.
    weights = jnp.exp(jnp.where(allowed, scores - jnp.moveaxis(top, -3, -1)[..., None], -jnp.inf))
    near = weighted_values(weights, extended(pairs.tokens.values))
    factor = jnp.exp(jnp.where(total > 0, log_scale - top, 0))
    return divided(near + factor[..., None] * far)
