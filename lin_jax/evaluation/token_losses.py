"""Losses of single tokens: by row, to tell how far a figure is from chance, and by position in the text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.layout import packed_rows, single_rows
from lin_jax.evaluation.perplexity import LOGITS
from lin_jax.losses.cross_entropy import Batch, inputs_of, shifted_targets
from lin_jax.models import CausalModel

# Draws of a bootstrap, and the share of them that an interval holds.
DRAWS, INTERVAL = 2000, 0.95


@dataclass(frozen=True)
class TokenLosses:
    """Cross entropies of the tokens of held-out rows, on the host.

    Attributes:
        losses: `[N, T]` of the token after each position, in nats; 0 where there is none to predict.
        included: `[N, T]` mask of the positions with a token to predict.
        positions: `[N, T]` position of each token in its own document, from 0.
    """

    losses: Float[np.ndarray, "N T"]
    included: Bool[np.ndarray, "N T"]
    positions: Int[np.ndarray, "N T"]

    @property
    def perplexity(self) -> float:
        """Of all tokens, each of the same weight."""
        return self.perplexity_of(self.included)

    def perplexity_of(self, chosen: Bool[np.ndarray, "N T"]) -> float:
        """Of some of the tokens; NaN without any."""
        chosen = chosen & self.included
        count = int(np.sum(chosen))
        return math.exp(min(float(np.sum(self.losses[chosen], dtype=np.float64)) / count, 700)) if count else math.nan


@dataclass(frozen=True)
class Ratio:
    """Perplexity of a student over its teacher's.

    Attributes:
        value: the ratio; 1 is as good as the teacher.
        low: lower end of the bootstrap's interval of 95%.
        high: its upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PositionBucket:
    """Ratio of the perplexities of tokens whose context has about one length.

    Attributes:
        begin: first position in the document.
        end: the one after the last.
        tokens: how many were predicted.
        teacher: the teacher's perplexity of them.
        student: the student's.
    """

    begin: int
    end: int
    tokens: int
    teacher: float
    student: float

    @property
    def ratio(self) -> float:
        """The student's perplexity over the teacher's."""
        return self.student / self.teacher


def token_losses(model: CausalModel, batches: Iterable[Batch]) -> TokenLosses:
    """Measures the loss of every token of batches of `tokens` and perhaps `segment_ids`, `[B, T+1]`."""
    each = [jax.device_get(_losses(model, dict(batch))) for batch in batches]
    return TokenLosses(*(np.concatenate(parts) for parts in zip(*each, strict=True)))


def ratio(student: TokenLosses, teacher: TokenLosses, *, seed: int = 0) -> Ratio:
    """Compares the perplexities of the same rows, with a paired bootstrap over rows.

    Tokens of a row depend on each other, and rows far less: whole rows are drawn, for both models the same.

    Args:
        student: losses of the student.
        teacher: losses of the teacher, on the same rows.
        seed: of the draws.
    """
    sums = np.asarray(np.sum(student.losses - teacher.losses, axis=1, dtype=np.float64))
    counts = np.asarray(np.sum(student.included, axis=1))
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = np.sum(sums[drawn], axis=1) / np.maximum(np.sum(counts[drawn], axis=1), 1)
    outside = (1 - INTERVAL) / 2
    low, high = np.exp(np.quantile(means, [outside, 1 - outside]))
    return Ratio(float(np.exp(np.sum(sums) / max(np.sum(counts), 1))), float(low), float(high))


def position_edges(trained: int, longest: int) -> list[int]:
    """Edges of buckets of positions: eighths of powers of two of the training length, up to the longest row.

    Args:
        trained: tokens of a row in training.
        longest: tokens of the rows that are measured.
    """
    edges = [0, *(trained // part for part in (8, 4, 2) if trained // part), trained]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return sorted({edge for edge in edges if edge <= longest})


def by_position(student: TokenLosses, teacher: TokenLosses, edges: Sequence[int]) -> list[PositionBucket]:
    """Perplexities of both by the position of a token in its document; buckets without any token are left out.

    Args:
        student: losses of the student.
        teacher: losses of the teacher, on the same rows.
        edges: where one bucket ends and the next begins.
    """
    found = []
    for begin, end in pairwise(edges):
        inside = (teacher.positions >= begin) & (teacher.positions < end)
        count = int(np.sum(inside & teacher.included))
        if count:
            pair = teacher.perplexity_of(inside), student.perplexity_of(inside)
            found.append(PositionBucket(begin, end, count, *pair))
    return found


@jax.jit
def _losses(model: CausalModel, batch: dict[str, Array]) -> tuple[Array, Array, Array]:
    tokens, segment_ids = inputs_of(batch)
    layout = single_rows(tokens.shape, None) if segment_ids is None else packed_rows(jnp.asarray(segment_ids))
    hidden, (ids, included) = model.hidden(tokens, segment_ids), shifted_targets(batch, 1)
    size = max(LOGITS // (tokens.shape[0] * model.embed.num_embeddings), 1)
    losses = _in_pieces(partial(_piece_losses, model), (hidden, ids), min(size, tokens.shape[1]))
    return jnp.where(included, losses, 0), included, layout.positions


def _piece_losses(model: CausalModel, piece: tuple[Array, Array]) -> Float[Array, "B C"]:
    hidden, ids = piece
    logits = model.logits(hidden)
    right = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


def _in_pieces(apply: partial[Array], rows: tuple[Array, Array], size: int) -> Float[Array, "B T"]:
    """Applies a function to pieces `[B, C, ...]` of rows `[B, T, ...]`, so that all logits are never there at once."""
    length = rows[0].shape[1]
    if size == length:
        return apply(rows)

    def cut(leaf: Array) -> Array:
        padded = jnp.pad(leaf, ((0, 0), (0, -length % size), *((0, 0),) * (leaf.ndim - 2)))
        return jnp.moveaxis(padded.reshape(leaf.shape[0], -1, size, *leaf.shape[2:]), 1, 0)

    pieces = jax.lax.map(apply, jax.tree.map(cut, rows))
    return jnp.moveaxis(pieces, 0, 1).reshape(pieces.shape[1], -1)[:, :length]
