"""Rows of a batch as slots: a new sequence replaces a finished one without recompilation."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

_State = TypeVar("_State")

# Recurrent states have a leading layer axis; everything else begins with the batch.
_STACKED = {"model", "drafter"}
_SHARED = {"seed"}


def map_rows(apply: Callable[..., Array], state: _State, *others: _State) -> _State:
    """Maps `apply(batch_axis, leaf, *other_leaves)` over the leaves that have rows; shared leaves stay as they are.

    The batch axis follows from a leaf's attribute path: leaves below `model` or `drafter` have a leading layer axis.
    """

    def one(path: tuple[Any, ...], leaf: Array, *rest: Array) -> Array:
        names = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        return leaf if names & _SHARED else apply(1 if names & _STACKED else 0, leaf, *rest)

    return jax.tree_util.tree_map_with_path(one, state, *others)


@partial(jax.jit, donate_argnames="state")
def insert_rows(state: _State, fresh: _State, slots: Int[Array, " k"]) -> _State:
    """State with the rows of another one written into the given slots; a slot beyond the last drops its row."""

    def place(axis: int, old: Array, new: Array) -> Array:
        where = (slice(None),) * axis + (slots,)
        return old.at[where].set(new.astype(old.dtype), mode="drop")

    return map_rows(place, state, fresh)


@partial(jax.jit, static_argnames="count")
def repeat_rows(state: _State, *, count: int) -> _State:
    """State of one row repeated `count` times."""
    return map_rows(lambda axis, leaf: jnp.repeat(leaf, count, axis=axis), state)


def bucket(count: int, smallest: int = 1) -> int:
    """Next power of two that is at least `count` and `smallest`, so that similar counts share compiled programs."""
    return 1 << max(count - 1, smallest - 1).bit_length()
