"""Rows of a batch as slots: a finished sequence makes room for the next without compiling anything anew."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

State = TypeVar("State")

# Recurrent states have a leading layer axis; everything else begins with the batch.
_STACKED = {"model", "drafter"}
_SHARED = {"seed"}


def over_rows(apply: Callable[..., Array], state: State, *others: State) -> State:
    """Applies `apply(axis, leaf, *other leaves)` to whatever has rows, `axis` being that of the batch."""

    def one(path: tuple[Any, ...], leaf: Array, *rest: Array) -> Array:
        names = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        return leaf if names & _SHARED else apply(1 if names & _STACKED else 0, leaf, *rest)

    return jax.tree_util.tree_map_with_path(one, state, *others)


@partial(jax.jit, donate_argnames="state")
def insert(state: State, fresh: State, slots: Int[Array, " k"]) -> State:
    """The state with the rows of another one in the given slots; a slot beyond the last leaves its row out."""

    def place(axis: int, old: Array, new: Array) -> Array:
        where = (slice(None),) * axis + (slots,)
        return old.at[where].set(new.astype(old.dtype), mode="drop")

    return over_rows(place, state, fresh)


@partial(jax.jit, static_argnames="count")
def repeated(state: State, *, count: int) -> State:
    """A state of one row, `count` times."""
    return over_rows(lambda axis, leaf: jnp.repeat(leaf, count, axis=axis), state)


def bucket(count: int, smallest: int = 1) -> int:
    """The next power of two, so that counts share compiled programs."""
    return 1 << max(count - 1, smallest - 1).bit_length()
