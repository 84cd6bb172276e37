"""How often the r-th guess of a Medusa head is the token that really comes: what draft trees are chosen from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lin_jax.evaluation.targets import Batch, stack_targets, targets_ahead
from lin_jax.models import CausalModel, MedusaHeads

RANKS = 10


@dataclass(frozen=True)
class HeadAccuracy:
    """A table of hits.

    Attributes:
        table: `[M, R]` share of positions whose token m + 2 ahead is exactly guess r (from 0) of head m (from 0).
        counts: `[M]` positions each head was tried at.
    """

    table: np.ndarray
    counts: np.ndarray

    def save(self, path: Path) -> None:
        """Writes `{"table": [M][R], "counts": [M]}` as JSON."""
        path.write_text(json.dumps({"table": self.table.tolist(), "counts": self.counts.tolist()}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "HeadAccuracy":
        """Reads what `save` wrote."""
        content = json.loads(path.read_text())
        return cls(np.asarray(content["table"]), np.asarray(content["counts"]))

    def __str__(self) -> str:
        """A small text table: a line a head, a column a guess."""
        ranks = range(1, self.table.shape[1] + 1)
        lines = ["head  ahead" + "".join(f"{f'guess {rank}':>10}" for rank in ranks)]
        for head, row in enumerate(self.table):
            lines.append(f"{head:>4}{head + 2:>7}" + "".join(f"{share:>10.3f}" for share in row))
        return "\n".join(lines)


def head_accuracy(
    model: CausalModel, heads: MedusaHeads, batches: Iterable[Batch], *, ranks: int = RANKS
) -> HeadAccuracy:
    """How often each guess of each head is right.

    Args:
        model: the base model.
        heads: its heads.
        batches: `tokens` and `documents`, `[B, T+1]`; a batch may also hold `truth`, `[B, T+1]`, tokens to compare
            the guesses with in place of the text itself (such as what the base model would have said).
        ranks: how many guesses R of a head to look at.
    """
    hits, counts = np.zeros((heads.count, ranks), np.int64), np.zeros(heads.count, np.int64)
    for batch in batches:
        found, tried = _hits(model, heads, dict(batch), ranks=ranks)
        hits, counts = hits + np.asarray(found), counts + np.asarray(tried)
    return HeadAccuracy(hits / np.maximum(counts, 1)[:, None], counts)


@partial(jax.jit, static_argnames="ranks")
def _hits(
    model: CausalModel, heads: MedusaHeads, batch: dict[str, Array], *, ranks: int
) -> tuple[Int[Array, "M R"], Int[Array, " M"]]:
    hidden = model.hidden(batch["tokens"][:, :-1], batch["documents"][:, :-1])
    truth = {"tokens": batch.get("truth", batch["tokens"]), "documents": batch["documents"]}
    ids, included = stack_targets(targets_ahead(truth, head + 2) for head in range(heads.count))
    rank = _rank(heads(hidden), ids)
    hits = (rank[..., None] == jnp.arange(ranks)) & included[..., None]
    return jnp.sum(hits, axis=(0, 1)), jnp.sum(included, axis=(0, 1))


def _rank(logits: Float[Array, "*batch V"], ids: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The place of a token among all, from 0, as `top_k` orders them: equal logits by token number."""
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < ids[..., None]
    return jnp.sum((logits > own) | ((logits == own) & before), axis=-1)
