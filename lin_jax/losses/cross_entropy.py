"""Targets of a model's predictions, and the sums over tokens that every loss and metric is made of.

Losses and accuracies are kept as sums and counts to the very end, so that a batch gives the same metric however it
is cut into pieces.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Batch = Mapping[str, Any]


class Targets(NamedTuple):
    """The tokens to predict at every input position, and where there is one to predict."""

    ids: Int[Array, "B T"]
    included: Bool[Array, "B T"]


class Sums(NamedTuple):
    """Sums over tokens, each `[K]` for K predictors; arrays of JAX, or of NumPy on the host.

    They are cross entropy in nats, right first guesses, and how many tokens were predicted.
    """

    loss: Any
    correct: Any
    tokens: Any

    @classmethod
    def joined(cls, each: Sequence["Sums"]) -> "Sums":
        """The sums over several batches, in float64 and int64 on the host."""
        wide = (np.float64, np.int64, np.int64)
        parts = zip(zip(*each, strict=True), wide, strict=True)
        return cls(*(np.sum(part, axis=0, dtype=dtype) for part, dtype in parts))


def inputs_of(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
    """The T tokens of each row that a model reads, and their segment ids; None where a row is one text.

    Args:
        batch: `tokens` and perhaps `segment_ids`, `[B, T+1]`.
    """
    segment_ids = batch.get("segment_ids")
    return batch["tokens"][:, :-1], None if segment_ids is None else segment_ids[:, :-1]


def shifted_targets(batch: Batch, ahead: int) -> Targets:
    """The tokens `ahead` (from 1 to T) positions after each of the T inputs, within the same document.

    Args:
        batch: `tokens` and perhaps `segment_ids`, `[B, T+1]`; document 0 is padding; without documents a row is one
            text. With `loss_mask` `[B, T+1]`, only tokens where it is not zero are targets.
        ahead: number of positions.
    """

    def shift(rows: Array) -> Array:
        return jnp.pad(rows[:, ahead:], ((0, 0), (0, ahead - 1)))

    tokens = jnp.asarray(batch["tokens"])
    segment_ids = jnp.asarray(batch.get("segment_ids", jnp.ones_like(tokens)))
    here = segment_ids[:, :-1]
    included = (shift(segment_ids) == here) & (here > 0)
    if (mask := batch.get("loss_mask")) is not None:
        included &= shift(jnp.asarray(mask)) > 0
    return Targets(shift(tokens), included)


def stack_targets(targets: Iterable[Targets]) -> Targets:
    """Targets of K predictors side by side, `[B, T, K]`."""
    ids, included = zip(*targets, strict=True)
    return Targets(jnp.stack(ids, axis=-1), jnp.stack(included, axis=-1))


def path_ahead(batch: Batch, depth: int) -> tuple[Int[Array, "B T K"], Targets]:
    """The path of K tokens that comes after each of the T inputs, and the token to guess after each of those.

    Where there is one to guess, all of the path before it is in the same document.
    """
    targets = [shifted_targets(batch, ahead) for ahead in range(1, depth + 2)]
    return stack_targets(targets[:-1]).ids, stack_targets(targets[1:])


def token_sums(logits: Float[Array, "B T K V"], targets: Targets) -> Sums:
    """Sums of K predictors' cross entropies against targets `[B, T, K]`, in the type of the logits."""
    right = jnp.take_along_axis(logits, targets.ids[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - right
    # Equal to `argmax == target` but for ties, without a second, slower reduction over the vocabulary.
    hits = (right >= jnp.max(logits, axis=-1)) & targets.included
    return Sums(
        jnp.sum(jnp.where(targets.included, losses, 0), axis=(0, 1)),
        jnp.sum(hits, axis=(0, 1)),
        jnp.sum(targets.included, axis=(0, 1)),
    )


def distillation_sums(
    logits: Float[Array, "B T K V"], teacher: Float[Array, "B T V"], included: Bool[Array, "B T K"]
) -> Sums:
    """Sums of K predictors' cross entropies against a teacher's distributions; right is what it finds likeliest.

    Args:
        logits: of predictor k (from 0), at every position, of the token k + 2 after it.
        teacher: logits of the token after each position.
        included: mask of the positions with a token to predict.
    """
    losses, hits = [], []
    for k in range(logits.shape[2]):
        shown = jnp.pad(teacher[:, k + 1 :], ((0, 0), (0, k + 1), (0, 0)))
        guessed = logits[:, :, k]
        losses.append(jax.nn.logsumexp(guessed, axis=-1) - jnp.sum(jax.nn.softmax(shown) * guessed, axis=-1))
        hits.append(jnp.argmax(guessed, axis=-1) == jnp.argmax(shown, axis=-1))
    return Sums(
        jnp.sum(jnp.where(included, jnp.stack(losses, axis=-1), 0), axis=(0, 1)),
        jnp.sum(jnp.stack(hits, axis=-1) & included, axis=(0, 1)),
        jnp.sum(included, axis=(0, 1)),
    )


def sum_over_batches(sums: Callable[[Batch], Any], batches: Iterable[Batch]) -> Any:
    """The sums over all (at least one) batches, joined on the host as their type has it."""
    each = [jax.device_get(sums(batch)) for batch in batches]
    return type(each[0]).joined(each)
