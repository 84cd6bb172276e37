"""Medusa's typical acceptance: a drafted token stands if the target finds it likely enough. It changes the output."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def typical(
    log_p: Float[Array, "B N V"], tokens: Int[Array, "B N"], epsilon: float = 0.09, alpha: float = 0.3
) -> Bool[Array, "B N"]:
    """Whether each token is typical of a distribution: p(x) > min(epsilon, alpha * exp(-H(p))) (Cai et al. 2024).

    Lossy: what is accepted need not be what the target would have chosen, and is not distributed as its samples are.
    The less certain the target is (the larger its entropy H), the less probable a token may be.

    Args:
        log_p: `[B, N, V]` the target's normalised log-probabilities of the token in question, that is those after each
            node's parent; minus infinity for what was filtered out.
        tokens: `[B, N]` the nodes' tokens; -1, where there is none, is never accepted.
        epsilon: probability above which any token is accepted.
        alpha: fraction of exp(-H) above which it is accepted.
    """
    log_p = log_p.astype(jnp.promote_types(log_p.dtype, jnp.float32))
    entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)
    threshold = jnp.minimum(epsilon, alpha * jnp.exp(-entropy))
    probability = jnp.exp(jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0])
    return (tokens >= 0) & (probability > threshold)
