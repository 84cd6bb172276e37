"""How the next token is chosen from logits: greedily, or at random with keys that depend on the position alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from lin_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling options; temperature 0 is greedy.

    Attributes:
        temperature: divisor of the logits, 0 for the most probable token.
        top_k: keep only the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; give a probability above 0 and up to 1")


def filter_logits(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Logits after temperature, top-k and top-p; tokens that are left out get minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        threshold = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def perturb(
    logits: Float[Array, "B N V"],
    positions: Int[Array, "B N"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    sampling: Sampling,
) -> Float[Array, "B N V"]:
    """Logits whose largest entry is the target's choice: as they are if greedy, else filtered and with Gumbel noise.

    The noise depends on the seed, the row's number and the absolute position of the chosen token, so that a token is
    drawn alike whether it is reached in one step or as part of a tree.

    Args:
        logits: `[B, N, V]`.
        positions: `[B, N]` absolute position of the token to be chosen.
        rows: `[B]` number of each sequence among all that are decoded.
        seed: of all random numbers.
        sampling: options.
    """
    if sampling.temperature == 0:
        return logits

    def noise(row: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.gumbel(key, logits.shape[-1:], logits.dtype)

    return filter_logits(logits, sampling) + jax.vmap(jax.vmap(noise, (None, 0)))(rows, positions)


def choose(
    logits: Float[Array, "B N V"],
    positions: Int[Array, "B N"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    sampling: Sampling,
) -> Int[Array, "B N"]:
    """The target's choice after each node; arguments as in `perturb`."""
    return jnp.argmax(perturb(logits, positions, rows, seed, sampling), axis=-1).astype(jnp.int32)
