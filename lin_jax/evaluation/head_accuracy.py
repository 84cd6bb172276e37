"""Accuracy of the r-th guess of draft heads at each depth, from which draft shapes are chosen."""

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
        chosen: `[K, R]` share of the same positions where guess r is what the base model itself finds likeliest there,
            after the real text: what greedy decoding accepts. None in files of versions that did not measure it.
    """

    table: np.ndarray
    counts: np.ndarray
    chosen: np.ndarray | None = None

    @property
    def accepted(self) -> Float[np.ndarray, "K R"]:
        """`[K, R]` the better estimate of how often a guess is accepted: `chosen` where it is known."""
        return self.table if self.chosen is None else self.chosen

    def save(self, path: Path) -> None:
        """Writes `{"table": [K][R], "counts": [K], "chosen": [K][R]}` as JSON."""
        content = {"table": self.table, "counts": self.counts, "chosen": self.chosen}
        lists = {name: array.tolist() for name, array in content.items() if array is not None}
        path.write_text(json.dumps(lists, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "HeadAccuracy":
        """Reads a file that `save` wrote."""
        content = json.loads(path.read_text())
        chosen = content.get("chosen")
        return cls(
            np.asarray(content["table"]), np.asarray(content["counts"]), None if chosen is None else np.asarray(chosen)
        )

    def __str__(self) -> str:
        """Small text tables: a line a depth, a column a guess."""
        parts = ["share of guesses that are the token that comes:", *_lines(self.table)]
        if self.chosen is not None:
            parts += ["share of guesses that are what the model itself would choose there:", *_lines(self.chosen)]
        return "\n".join(parts)


def _lines(table: Float[np.ndarray, "K R"]) -> list[str]:
    lines = ["depth  ahead" + "".join(f"{f'guess {rank}':>10}" for rank in range(1, table.shape[1] + 1))]
    for depth, row in enumerate(table):
        lines.append(f"{depth:>5}{depth + 2:>7}" + "".join(f"{share:>10.3f}" for share in row))
    return lines


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
    hits, counts = np.zeros((2, depth, ranks), np.int64), np.zeros(depth, np.int64)
    for batch in batches:
        found, tried = _hits(model, heads, dict(batch), depth=depth, ranks=ranks)
        hits, counts = hits + np.asarray(found), counts + np.asarray(tried)
    table, chosen = hits / np.maximum(counts, 1)[:, None]
    return HeadAccuracy(table, counts, chosen)


@partial(jax.jit, static_argnames=("depth", "ranks"))
def _hits(
    model: CausalModel, heads: DraftHeads, batch: dict[str, Array], *, depth: int, ranks: int
) -> tuple[Int[Array, "2 K R"], Int[Array, " K"]]:
    """Guesses that are the token that comes, and those that the model would choose; and how many there are of each."""
    hidden = model.hidden(*inputs_of(batch))
    path, (ids, included) = path_ahead(batch | {"tokens": batch.get("truth", batch["tokens"])}, depth)
    logits, likeliest = heads.guess(hidden, path), jnp.argmax(model.logits(hidden), axis=-1)
    ahead = [jnp.pad(likeliest[:, k + 1 :], ((0, 0), (0, k + 1))) for k in range(depth)]

    def counted(tokens: Int[Array, "B T K"]) -> Int[Array, "K R"]:
        hits = (_rank(logits, tokens)[..., None] == jnp.arange(ranks)) & included[..., None]
        return jnp.sum(hits, axis=(0, 1))

    both = jnp.stack([counted(ids), counted(jnp.stack(ahead, axis=-1))])
    return both, jnp.sum(included, axis=(0, 1))


def _rank(logits: Float[Array, "*batch V"], ids: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The place of a token among all, from 0, as `top_k` orders them: equal logits by token number."""
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < ids[..., None]
    return jnp.sum((logits > own) | ((logits == own) & before), axis=-1)
