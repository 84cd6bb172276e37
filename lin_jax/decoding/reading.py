"""Reading prompts: pieces of bounded size, so that a prompt of any length needs the memory of one piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.decoding.draft import Drafter
from lin_jax.models import CausalModel

# Smaller pieces than this cost about as much.
_SMALLEST = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """What is left of texts that were read.

    Attributes:
        model: the model's recurrent state.
        drafter: the drafter's own.
        hidden: `[B, E]` the hidden vector of each text's last token.
        recent: `[B, W]` the last tokens, newest last; -1 before the beginning.
        seen: `[B, V]` which tokens occur, or None if nobody asks.
    """

    model: Any
    drafter: Any
    hidden: Float[Array, "B E"]
    recent: Int[Array, "B W"]
    seen: Bool[Array, "B V"] | None


@partial(jax.jit, static_argnames=("batch", "capacity", "seen"))
def nothing_read(model: CausalModel, drafter: Drafter, batch: int, capacity: int, *, seen: bool) -> Reading:
    """Before the first token; `capacity` is the longest sequence that a growing state must hold."""
    config = model.config
    return Reading(
        model=model.init_state(batch, capacity),
        drafter=drafter.init_state(batch, capacity),
        hidden=jnp.zeros((batch, config.hidden_size), config.dtype),
        recent=jnp.full((batch, drafter.lookback), -1, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool) if seen else None,
    )


@partial(jax.jit, donate_argnames="reading")
def read_piece(
    model: CausalModel, drafter: Drafter, reading: Reading, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Reading:
    """Reads one piece of every text, `lengths` tokens of each row."""
    outputs, state = model.prefill(tokens, lengths, reading.model)
    last = jnp.take_along_axis(outputs, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    read = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return Reading(
        model=state,
        drafter=drafter.read(reading.drafter, tokens, lengths),
        hidden=jnp.where((lengths > 0)[:, None], last, reading.hidden),
        recent=pushed(reading.recent, tokens, lengths),
        seen=marked(reading.seen, tokens, read),
    )


def pushed(recent: Int[Array, "B W"], tokens: Int[Array, "B P"], count: Int[Array, " B"]) -> Int[Array, "B W"]:
    """The last tokens after the first `count` of some more."""
    width = recent.shape[1]
    if not width:
        return recent
    extended = jnp.concatenate([recent, tokens.astype(recent.dtype)], axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (width,)))(extended, count)


def marked(
    seen: Bool[Array, "B V"] | None, tokens: Int[Array, "B P"], included: Bool[Array, "B P"]
) -> Bool[Array, "B V"] | None:
    """Which tokens occur, with the included ones of some more."""
    if seen is None:
        return None
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, jnp.where(included, tokens, seen.shape[1])].set(True, mode="drop")


def read(model: CausalModel, drafter: Drafter, reading: Reading, texts: Sequence[Sequence[int]], piece: int) -> Reading:
    """Reads texts, one for each of the first rows, at most `piece` tokens at a time."""
    batch = reading.hidden.shape[0]
    longest = max((len(text) for text in texts), default=0)
    for begin, size in pieces(longest, piece):
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, text in enumerate(texts):
            part = text[begin : begin + size]
            lengths[row] = len(part)
            tokens[row, : len(part)] = part
        reading = read_piece(model, drafter, reading, jnp.asarray(tokens), jnp.asarray(lengths))
    return reading


def pieces(length: int, largest: int) -> Iterator[tuple[int, int]]:
    """Where pieces of a text begin, and how long they are: a few sizes only, so that lengths share programs."""
    sizes = [size for size in (largest // 16, largest // 4, largest) if size >= _SMALLEST or size == largest]
    begin = 0
    while begin < length:
        size = next((size for size in sizes if size >= length - begin), largest)
        yield begin, size
        begin += size
