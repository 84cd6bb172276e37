"""Chunked prefill: prompts are read in chunks of bounded size, so that any length needs the memory of one chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention import Layout, padded_rows
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.engine.layers_alone import layers_alone, runs_by_layers
from lin_jax.decoding.engine.programs import Flat
from lin_jax.models import CausalModel
from lin_jax.models.by_kind import ByKind

# Smaller chunks than these cost about as much: of most models, and of large ones on a CPU, which is busy earlier.
_MIN_CHUNK, _MIN_CHUNK_BY_LAYERS = 32, 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Decode state after prefill: everything that is kept of the texts read so far.

    `slots` finds batch axes by the names `model` and `drafter`, and saved prefixes name arrays by attribute path.

    Attributes:
        model: the model's recurrent state, leaves `[L, B, ...]`.
        drafter: the drafter's state, leaves `[L, B, ...]`.
        hidden: `[B, W]` hidden vector of each text's last token.
        recent: `[B, W]` last tokens, newest last; -1 before the beginning.
        seen: `[B, V]` mask of the tokens that occur, or None if there is no repetition penalty.
    """

    model: Any
    drafter: Any
    hidden: Float[Array, "B W"]
    recent: Int[Array, "B W"]
    seen: Bool[Array, "B V"] | None


@partial(jax.jit, static_argnames=("batch", "capacity", "seen"))
def init_decode_state(model: CausalModel, drafter: Drafter, batch: int, capacity: int, *, seen: bool) -> DecodeState:
    """Decode state before the first token; `capacity` is the longest sequence that a growing state must hold."""
    config = model.config
    return DecodeState(
        model=model.init_state(batch, capacity),
        drafter=drafter.init_state(batch, capacity),
        hidden=jnp.zeros((batch, model.hidden_width), config.dtype),
        recent=jnp.full((batch, drafter.lookback), -1, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool) if seen else None,
    )


@partial(jax.jit, donate_argnames="decode_state")
def prefill_chunk(
    modules: Flat, decode_state: DecodeState, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> DecodeState:
    """Reads one chunk of every text, `lengths` tokens of each row; the modules are model and drafter."""
    model, drafter = modules.whole()
    outputs, state = model.prefill(tokens, lengths, decode_state.model)
    return _after(drafter, replace(decode_state, model=state), outputs, tokens, lengths)


def _after(drafter: Drafter, decode_state: DecodeState, outputs: Array, tokens: Array, lengths: Array) -> DecodeState:
    """The decode state after a chunk, from one whose model has read it, and from the model's outputs."""
    last = jnp.take_along_axis(outputs, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    included = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return replace(
        decode_state,
        drafter=drafter.prefill(decode_state.drafter, tokens, lengths),
        hidden=jnp.where((lengths > 0)[:, None], last, decode_state.hidden),
        recent=append_recent(decode_state.recent, tokens, lengths),
        seen=mark_seen(decode_state.seen, tokens, included),
    )


def prefill_by_layers(
    modules: Flat, decode_state: DecodeState, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]
) -> DecodeState:
    """Does what `prefill_chunk` does, by one small program that every layer of a kind runs."""
    state = decode_state.model
    x, context, layout = _enter(modules, state.position[0], tokens, lengths)
    kinds = list(state.kinds) if isinstance(state, ByKind) else [state]
    aux = []
    for each in layers_alone(modules):
        x, kinds[each.kind] = _read(each.layer, each.place, x, context, layout, kinds[each.kind])
        aux += [x] * each.is_aux
    decode_state = _leave(modules, replace(decode_state, model=None), x, aux, tokens, lengths)
    return replace(decode_state, model=replace(state, kinds=tuple(kinds)) if isinstance(state, ByKind) else kinds[0])


@jax.jit
def _enter(modules: Flat, position: Array, tokens: Any, lengths: Any) -> tuple[Array, Any, Layout]:
    """Inputs of the first layer, and what all layers read."""
    layout = padded_rows(lengths, tokens.shape[1], position)
    return (*modules.whole()[0].begin(tokens, layout.positions), layout)


@partial(jax.jit, donate_argnames="states")
def _read(layer: Flat, place: Int[Array, ""], x: Array, context: Any, layout: Layout, states: Any) -> tuple[Array, Any]:
    """Outputs of a layer, and the states of all layers of its kind with its own after a chunk."""
    (block,) = layer.whole()
    x, own = block.parallel(x, context, layout, jax.tree.map(lambda leaf: leaf[place], states))
    return x, jax.tree.map(lambda leaf, new: leaf.at[place].set(new), states, own)


@partial(jax.jit, donate_argnames="decode_state")
def _leave(
    modules: Flat, decode_state: DecodeState, x: Array, aux: list[Array], tokens: Any, lengths: Any
) -> DecodeState:
    """The decode state after a chunk, but for the model's, from the outputs of the last layer and of `aux_layers`."""
    model, drafter = modules.whole()
    return _after(drafter, decode_state, model.outputs(jnp.concatenate([x, *aux], axis=-1)), tokens, lengths)


def append_recent(recent: Int[Array, "B W"], tokens: Int[Array, "B P"], count: Int[Array, " B"]) -> Int[Array, "B W"]:
    """Recent tokens after the first `count` of some new ones."""
    width = recent.shape[1]
    if not width:
        return recent
    extended = jnp.concatenate([recent, tokens.astype(recent.dtype)], axis=1)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (width,)))(extended, count)


def mark_seen(
    seen: Bool[Array, "B V"] | None, tokens: Int[Array, "B P"], included: Bool[Array, "B P"]
) -> Bool[Array, "B V"] | None:
    """Mask of the seen tokens after the included ones of some new ones."""
    if seen is None:
        return None
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, jnp.where(included, tokens, seen.shape[1])].set(True, mode="drop")


def prefill(modules: Flat, decode_state: DecodeState, texts: Sequence[Sequence[int]], chunk_size: int) -> DecodeState:
    """Reads texts, one for each of the first rows, at most `chunk_size` tokens at a time, with model and drafter."""
    batch = decode_state.hidden.shape[0]
    longest = max((len(text) for text in texts), default=0)
    read, least = (prefill_by_layers, _MIN_CHUNK_BY_LAYERS) if runs_by_layers(modules) else (prefill_chunk, _MIN_CHUNK)
    for begin, size in chunk_sizes(longest, chunk_size, least):
        tokens, lengths = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
        for row, text in enumerate(texts):
            chunk = text[begin : begin + size]
            lengths[row] = len(chunk)
            tokens[row, : len(chunk)] = chunk
        decode_state = read(modules, decode_state, tokens, lengths)
    return decode_state


def chunk_sizes(length: int, largest: int, least: int = _MIN_CHUNK) -> Iterator[tuple[int, int]]:
    """Yields begin and size of each chunk of a text: a few sizes only, so that all lengths share compiled programs.

    Each is half the next, so that the end of a text is not read with more padding than tokens, unless it is short.
    """
    halves = [largest // (8 * _MIN_CHUNK // least), largest // 8, largest // 4, largest // 2]
    sizes = [*(size for size in halves if size >= least), largest]
    begin = 0
    while begin < length:
        size = next((size for size in sizes if size >= length - begin), largest)
        yield begin, size
        begin += size
