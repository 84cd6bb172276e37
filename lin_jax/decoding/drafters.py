"""Drafters: where guesses come from. Each offers a table of guesses, by depth and rank, for the tokens after the root.

Guess `[m, r]` is the rank-r guess of the token m + 1 after the root; -1 says that there is none.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.decoding.ngram import latest_continuation
from lin_jax.decoding.tree import DraftTree
from lin_jax.errors import UserError
from lin_jax.models import MedusaHeads


class DraftContext(NamedTuple):
    """What a drafter may look at.

    Attributes:
        hidden: `[B, E]` the hidden vector from which the root was chosen.
        tokens: `[B, C]` prompt and output so far, the root last.
        length: `[B]` how many of them there are.
    """

    hidden: Float[Array, "B E"]
    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]


@runtime_checkable
class Drafter(Protocol):
    """The contract: a table of `depth` by `width` guesses for every row."""

    depth: int
    width: int

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """Guesses, best rank first; -1 where there is none."""


class NoDrafter(nnx.Module):
    """Plain decoding: no guesses."""

    depth = 0
    width = 0

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """An empty table."""
        return jnp.zeros((context.length.shape[0], 0, 0), jnp.int32)


class MedusaDrafter(nnx.Module):
    """The most probable tokens of every Medusa head."""

    def __init__(self, heads: MedusaHeads, *, width: int = 10, depth: int | None = None) -> None:
        self.heads = heads
        self.depth = heads.count if depth is None else depth
        self.width = min(width, heads.output.shape[-1])

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """The `width` best tokens of the first `depth` heads."""
        logits = self.heads(context.hidden, self.depth)
        if self.width == 1:
            return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
        return jax.lax.top_k(logits, self.width)[1].astype(jnp.int32)


class NgramDrafter(nnx.Module):
    """Prompt lookup (Saxena 2023): what followed the latest earlier occurrence of the last tokens."""

    width = 1

    def __init__(self, *, depth: int = 4, longest: int = 3) -> None:
        self.depth = depth
        self.longest = longest

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """One guess for each depth; none where the last token never occurred before."""
        return latest_continuation(context.tokens, context.length, self.depth, self.longest)[:, :, None]


class UnionDrafter(nnx.Module):
    """Several drafters side by side: the ranks of the second begin where those of the first end."""

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = nnx.List(drafters)
        self.depth = max(drafter.depth for drafter in drafters)
        self.width = sum(drafter.width for drafter in drafters)

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """All tables, joined along the ranks."""
        tables = (drafter.guess(context) for drafter in self.drafters)
        return jnp.concatenate(
            [
                jnp.pad(table, ((0, 0), (0, self.depth - table.shape[1]), (0, 0)), constant_values=-1)
                for table in tables
            ],
            axis=2,
        )


HEAD_WIDTH = 10
KINDS = ("none", "medusa", "ngram", "medusa+ngram")
NGRAM_DEPTH = 8


def build_drafter(kind: str, heads: MedusaHeads | None = None, *, tree: DraftTree | None = None) -> Drafter:
    """A drafter by its name.

    Args:
        kind: one of KINDS; in `medusa+ngram` the ranks of the n-gram's guesses follow those of the heads.
        heads: Medusa heads, where the kind needs them.
        tree: the tree that will be used, so that heads and depths that it does not ask for are not computed.

    Raises:
        UserError: the kind is unknown, or needs heads that are not there.
    """
    if kind not in KINDS:
        raise UserError(f"drafter '{kind}' is unknown; choose one of {', '.join(KINDS)}")
    if "medusa" in kind and heads is None:
        raise UserError(f"drafter '{kind}' needs Medusa heads and there are none; train some, or choose ngram")
    parts: list[Drafter] = []
    paths = None if tree is None else tree.paths
    if heads is not None and "medusa" in kind:
        asked = [len(path) for path in paths or () if path[-1] < HEAD_WIDTH]
        parts.append(MedusaDrafter(heads, width=HEAD_WIDTH, depth=None if tree is None else max(asked, default=0)))
    if "ngram" in kind:
        offset = parts[0].width if parts else 0
        asked = [len(path) for path in paths or () if path[-1] >= offset]
        parts.append(NgramDrafter(depth=NGRAM_DEPTH if tree is None else max(asked, default=0)))
    if not parts:
        return NoDrafter()
    return parts[0] if len(parts) == 1 else UnionDrafter(*parts)
