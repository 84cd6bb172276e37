"""Choice of the next token from logits: greedy, or random with keys that depend on seed, row and position alone."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from lin_jax.errors import UserError
from pallas_kernels.precision import accumulation_dtype

# Rounding alone parts two logits by more than a lower temperature could make up for: it is greedy. Above the highest,
# and beyond a penalty of 1 / LARGEST to LARGEST, nothing changes but that float32 overflows.
COLDEST, LARGEST = 1e-9, 1e30
# Folded into the keys, so that drafting and acceptance use other random numbers than the target's own choice.
ACCEPTANCE_KEY, DRAFT_KEY = 1, 2


@dataclass(frozen=True)
class Sampling:
    """Sampling options, applied in the order of Hugging Face's `generate`; temperature 0 is greedy.

    That order is: repetition penalty, temperature, top-k, top-p, min-p. Greedy choices use the penalty alone. A
    temperature below `COLDEST` is 0, its limit; one above `LARGEST` is that, and so is a penalty, or its inverse.

    Attributes:
        temperature: divisor of the logits, 0 for the most probable token.
        top_k: keep only the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
        min_p: keep the tokens that are at least this fraction as probable as the most probable one.
        repetition_penalty: logits of tokens that occurred before are divided by it, negative ones multiplied (Keskar
            et al. 2019, "CTRL"); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; give a probability above 0 and up to 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p is {self.min_p}; give a fraction from 0 (all tokens) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition penalty is {self.repetition_penalty}; give 1 (none) or another positive number"
            )
        warmth = 0.0 if self.temperature < COLDEST else min(self.temperature, LARGEST)
        object.__setattr__(self, "temperature", warmth)
        penalty = min(max(self.repetition_penalty, 1 / LARGEST), LARGEST)
        object.__setattr__(self, "repetition_penalty", penalty)


def penalised(
    logits: Float[Array, "*batch V"], seen: Bool[Array, "*batch V"], penalty: float
) -> Float[Array, "*batch V"]:
    """Logits with a repetition penalty: those of seen tokens are divided by it, negative ones multiplied."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Logits after temperature, top-k, top-p and min-p; removed tokens get minus infinity.

    Args:
        logits: `[*batch, V]`.
        sampling: options, with a temperature above 0; the caller applies the repetition penalty before.
    """
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = jnp.where(_in_top_p(logits, sampling.top_p), logits, -jnp.inf)
    if sampling.min_p > 0:
        relative = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(relative < sampling.min_p, -jnp.inf, logits)
    return logits


def _in_top_p(logits: Float[Array, "*batch V"], top_p: float) -> Bool[Array, "*batch V"]:
    """Mask of the tokens that remain when the least probable ones, with up to `1 - top_p` together, are removed.

    As in Hugging Face's TopPLogitsWarper, the first of equally probable tokens is removed first, and one always stays.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ordered, order = jax.lax.sort((logits, index), num_keys=1, is_stable=True)
    taken_out = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - top_p
    first = jnp.minimum(jnp.sum(taken_out, axis=-1, keepdims=True), logits.shape[-1] - 1)
    least = jnp.take_along_axis(ordered, first, axis=-1)
    return (logits > least) | ((logits == least) & (index >= jnp.take_along_axis(order, first, axis=-1)))


def token_key(seed: UInt[Array, ""], row: Int[Array, ""], position: Int[Array, ""]) -> Key[Array, ""]:
    """Random key of the token at an absolute position of a row; further numbers are folded in for further keys."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)


def perturb(
    logits: Float[Array, "B N V"],
    positions: Int[Array, "B N"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    sampling: Sampling,
    seen: Bool[Array, "B N V"] | None = None,
    *,
    span: int | None = None,
) -> Float[Array, "B N V"]:
    """Scores whose largest entry is the target's choice: penalised logits, if sampled filtered and with Gumbel noise.

    The noise depends on the seed, the row's index and the absolute position of the chosen token, so that a token is
    drawn alike whether it is reached in one step or as part of a tree.

    Args:
        logits: `[B, N, V]`.
        positions: `[B, N]` absolute position of the token to be chosen.
        rows: `[B]` index of each sequence among all that are decoded.
        seed: seed of all random numbers.
        sampling: options.
        seen: `[B, N, V]` mask of the tokens that occurred in the prompt, the output or on the path; for the penalty.
        span: bound that a row's positions differ by less than, if known: nodes at equal positions share their noise,
            which is most of the work and is then made only once.

    Raises:
        ValueError: `sampling` has a repetition penalty, and `seen` is None.
    """
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs the seen tokens; give `seen`")
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits

    def noise(row: Array, position: Array) -> Array:
        return jax.random.gumbel(token_key(seed, row, position), logits.shape[-1:], logits.dtype)

    if span is None or span > positions.shape[1]:
        return filter_logits(logits, sampling) + jax.vmap(jax.vmap(noise, (None, 0)))(rows, positions)
    first = jnp.min(positions, axis=1)
    # A loop, because XLA would fuse a vectorised version into the sum, and make the noise again for every node.
    made = jax.lax.map(lambda order: jax.vmap(noise)(rows, first + order), jnp.arange(span))
    return filter_logits(logits, sampling) + made[positions - first[:, None], jnp.arange(len(rows))[:, None]]


def choose_tokens(
    logits: Float[Array, "B N V"],
    positions: Int[Array, "B N"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    sampling: Sampling,
    seen: Bool[Array, "B N V"] | None = None,
    *,
    span: int | None = None,
) -> Int[Array, "B N"]:
    """Chooses the target's token after each node; arguments and errors as in `perturb`."""
    return argmax(perturb(logits, positions, rows, seed, sampling, seen, span=span))


def argmax(scores: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Index of the largest entry, the first of equals; on a CPU three times as fast as `jnp.argmax`."""
    return jax.lax.top_k(scores, 1)[1][..., 0].astype(jnp.int32)


def log_probabilities(logits: Float[Array, "B N V"], tokens: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Log-probability of one token after each node by the model's own distribution: no penalty, temperature or filter.

    Args:
        logits: `[B, N, V]` the model's logits.
        tokens: `[B, N]` token ids from 0.
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def draw_children(
    log_q: Float[Array, "B K V"],
    count: int,
    positions: Int[Array, " B"],
    rows: Int[Array, " B"],
    nodes: Int[Array, " K"] | tuple[int, ...],
    seed: UInt[Array, ""],
) -> Int[Array, "B K count"]:
    """Draws children of some nodes, one after the other without replacement.

    The tokens with the largest log-probabilities plus Gumbel noise, in that order, are such a draw (Kool et al. 2019).

    Args:
        log_q: `[B, K, V]` the drafter's log-probabilities after each of the nodes.
        count: children per node.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` index of each sequence among all that are decoded.
        nodes: `[K]` indices of the nodes in their tree.
        seed: seed of all random numbers.

    Returns:
        `[B, K, count]` tokens; -1 where fewer than `count` have a probability above 0.
    """

    def noise(row: Array, position: Array, node: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(token_key(seed, row, position), DRAFT_KEY), node)
        return jax.random.gumbel(key, log_q.shape[-1:], accumulation_dtype(log_q.dtype))

    keyed = jax.vmap(jax.vmap(noise, (None, None, 0)), (0, 0, None))(rows, positions, jnp.asarray(nodes, jnp.int32))
    available = min(count, log_q.shape[-1])
    best, drawn = jax.lax.top_k(log_q + keyed, available)
    drawn = jnp.where(best > -jnp.inf, drawn, -1).astype(jnp.int32)
    return jnp.pad(drawn, ((0, 0), (0, 0), (0, count - available)), constant_values=-1)
