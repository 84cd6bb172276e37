"""Perplexity of a language model on held-out batches."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax

from lin_jax.evaluation.targets import Batch, Sums, inputs_of, targets_ahead, token_sums, total
from lin_jax.models import CausalModel


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
    """Sums `[1]` of the next-token cross entropy of a batch; targets never cross documents."""
    logits = model(*inputs_of(batch))
    targets = targets_ahead(batch, 1)
    return token_sums(logits[..., None, :], type(targets)(*(part[..., None] for part in targets)))


_next_token_sums = jax.jit(next_token_sums)


def evaluate(model: CausalModel, batches: Iterable[Batch]) -> Perplexity:
    """Perplexity of a model on batches of `tokens` and perhaps `documents`, `[B, T+1]`.

    Every token weighs the same, whatever batch it is in.
    """
    return Perplexity.of(total(lambda batch: _next_token_sums(model, dict(batch)), batches))
