"""Perplexity of a language model on held-out batches."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.evaluation.targets import Batch, Sums, Targets, inputs_of, targets_ahead, token_sums, total
from lin_jax.models import CausalModel

# Numbers in the logits that are made at once: a gigabyte in float32.
LOGITS = 2**28


@dataclass(frozen=True)
class Perplexity:
    """A figure over `tokens` predicted tokens.

    Attributes:
        loss: mean cross entropy, in nats a token; NaN without any token.
        tokens: how many tokens were predicted.
    """

    loss: float
    tokens: int

    @classmethod
    def of(cls, sums: Sums) -> "Perplexity":
        """The figure of a single predictor's sums `[1]`."""
        tokens = int(sums.tokens[0])
        return cls(float(sums.loss[0]) / tokens if tokens else math.nan, tokens)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that is out of range."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf


def next_token_sums(model: CausalModel, batch: Batch) -> Sums:
    """Sums `[1]` of the next-token cross entropy of a batch; targets never cross documents.

    Where a device's logits would be more than LOGITS numbers, they are made for some of the rows' tokens at a time, and
    again in the backward pass.
    """
    hidden = model.hidden(*inputs_of(batch))
    targets = targets_ahead(batch, 1)
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    count = -(-hidden.shape[0] * hidden.shape[1] * model.embed.num_embeddings // (LOGITS * devices))
    if count <= 1:
        return _sums(model, hidden, targets)

    def add(totals: Sums, part: tuple[Array, Targets]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, totals, jax.checkpoint(partial(_sums, model))(*part)), None

    parts = jax.tree.map(partial(_parts, count=count), (hidden, targets))
    shapes = jax.eval_shape(partial(_sums, model), *jax.tree.map(lambda rows: rows[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _sums(model: CausalModel, hidden: Float[Array, "B T E"], targets: Targets) -> Sums:
    return token_sums(model.logits(hidden)[..., None, :], Targets(*(part[..., None] for part in targets)))


def _parts(rows: Array, count: int) -> Array:
    """Rows `[B, T, ...]` as `[count, B, T / count, ...]`; what is missing at the end is zero, which no target is in.

    A part takes tokens from all over a row, so that every device has some of those that lie along the mesh.
    """
    length = -(-rows.shape[1] // count)
    padded = jnp.pad(rows, ((0, 0), (0, count * length - rows.shape[1]), *((0, 0),) * (rows.ndim - 2)))
    return jnp.moveaxis(padded.reshape(rows.shape[0], length, count, *rows.shape[2:]), 2, 0)


_next_token_sums = jax.jit(next_token_sums)


def evaluate(model: CausalModel, batches: Iterable[Batch]) -> Perplexity:
    """Perplexity of a model on batches of `tokens` and perhaps `documents`, `[B, T+1]`.

    Every token weighs the same, whatever batch it is in.
    """
    return Perplexity.of(total(lambda batch: _next_token_sums(model, dict(batch)), batches))
