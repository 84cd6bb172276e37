"""Accuracy of the r-th guess of draft heads at each depth, from which draft trees are chosen."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.losses.cross_entropy import Batch, inputs_of, path_ahead
from lin_jax.models import CausalModel

RANKS = 10
# Where a run of heads keeps theirs.
ACCURACY_FILE = "head_accuracy.json"


class DraftHeads(Protocol):
    """Heads that guess the tokens after the next one: `MedusaHeads`, `PathHead`."""

    def guess(self, hidden: Float[Array, "*batch E"], path: Int[Array, "*batch K"]) -> Float[Array, "*batch K V"]:
        """Logits of the token after each token of a path, whose first was chosen from the hidden vector."""


@dataclass(frozen=True)
class HeadAccuracy:
    """Accuracy of each guess at each depth.

    Attributes:
        table: `[K, R]` share of positions whose token k + 2 ahead is exactly guess r (from 0) at depth k (from 0): of
            Medusa's head k, or of a path head after the k + 1 tokens before, as they really come.
        counts: `[K]` positions that were tried at each depth.
    """

    table: np.ndarray
    counts: np.ndarray

    def save(self, path: Path) -> None:
        """Writes `{"table": [K][R], "counts": [K]}` as JSON."""
        path.write_text(json.dumps({"table": self.table.tolist(), "counts": self.counts.tolist()}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "HeadAccuracy":
        """Reads a file that `save` wrote."""
        content = json.loads(path.read_text())
        return cls(np.asarray(content["table"]), np.asarray(content["counts"]))

    def __str__(self) -> str:
        """A small text table: a line a depth, a column a guess."""
        ranks = range(1, self.table.shape[1] + 1)
        lines = ["depth  ahead" + "".join(f"{f'guess {rank}':>10}" for rank in ranks)]
        for depth, row in enumerate(self.table):
            lines.append(f"{depth:>5}{depth + 2:>7}" + "".join(f"{share:>10.3f}" for share in row))
        return "\n".join(lines)


def head_accuracy(
    model: CausalModel, heads: DraftHeads, batches: Iterable[Batch], *, depth: int, ranks: int = RANKS
) -> HeadAccuracy:
    """Measures the accuracy of each guess at each depth.

    Args:
        model: the base model.
        heads: its heads.
        batches: `tokens` and perhaps `segment_ids`, `[B, T+1]`; a batch may also hold `truth`, `[B, T+1]`,
            tokens to follow and to compare the guesses with in place of the text itself (such as what the base model
            would have said).
        depth: number of depths K to look at; Medusa's heads have one each.
        ranks: number of guesses R at a depth to look at.
    """
    hits, counts = np.zeros((depth, ranks), np.int64), np.zeros(depth, np.int64)
    for batch in batches:
        found, tried = _hits(model, heads, dict(batch), depth=depth, ranks=ranks)
        hits, counts = hits + np.asarray(found), counts + np.asarray(tried)
    return HeadAccuracy(hits / np.maximum(counts, 1)[:, None], counts)


@partial(jax.jit, static_argnames=("depth", "ranks"))
def _hits(
    model: CausalModel, heads: DraftHeads, batch: dict[str, Array], *, depth: int, ranks: int
) -> tuple[Int[Array, "K R"], Int[Array, " K"]]:
    hidden = model.hidden(*inputs_of(batch))
    path, (ids, included) = path_ahead(batch | {"tokens": batch.get("truth", batch["tokens"])}, depth)
    rank = _rank(heads.guess(hidden, path), ids)
    hits = (rank[..., None] == jnp.arange(ranks)) & included[..., None]
    return jnp.sum(hits, axis=(0, 1)), jnp.sum(included, axis=(0, 1))


def _rank(logits: Float[Array, "*batch V"], ids: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The place of a token among all, from 0, as `top_k` orders them: equal logits by token number."""
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < ids[..., None]
    return jnp.sum((logits > own) | ((logits == own) & before), axis=-1)
