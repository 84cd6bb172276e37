"""Perplexity of a language model on held-out batches."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from lin_jax.losses.chunked import sums_in_chunks
from lin_jax.losses.cross_entropy import Batch, Sums, Targets, inputs_of, shifted_targets, sum_over_batches, token_sums
from lin_jax.models import CausalModel

# Numbers in the logits that are made at once: a gigabyte in float32.
LOGITS = 2**28


@dataclass(frozen=True)
class Perplexity:
    """Mean loss, and perplexity, over `tokens` predicted tokens.

    Attributes:
        loss: mean cross entropy, in nats a token; NaN without any token.
        tokens: number of predicted tokens.
    """

    loss: float
    tokens: int

    @classmethod
    def of(cls, sums: Sums) -> "Perplexity":
        """The perplexity of a single predictor's sums `[1]`."""
        tokens = int(sums.tokens[0])
        return cls(float(sums.loss[0]) / tokens if tokens else math.nan, tokens)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that is out of range."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf


def next_token_sums(model: CausalModel, batch: Batch) -> Sums:
    """Sums `[1]` of the next-token cross entropy of a batch; targets never cross documents.

    Logits that would be more than LOGITS numbers on a device are made in parts.
    """

    def sums(rows: tuple[Float[Array, "B T E"], Targets]) -> Sums:
        hidden, targets = rows
        return token_sums(model.logits(hidden)[..., None, :], Targets(*(part[..., None] for part in targets)))

    rows = model.hidden(*inputs_of(batch)), shifted_targets(batch, 1)
    return sums_in_chunks(sums, rows, vocabulary=model.embed.num_embeddings, max_logits=LOGITS)


_next_token_sums = jax.jit(next_token_sums)


def evaluate(model: CausalModel, batches: Iterable[Batch]) -> Perplexity:
    """Perplexity of a model on batches of `tokens` and perhaps `segment_ids`, `[B, T+1]`.

    Every token weighs the same, whatever batch it is in.
    """
    return Perplexity.of(sum_over_batches(lambda batch: _next_token_sums(model, dict(batch)), batches))
