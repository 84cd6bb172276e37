"""The compiled loop: draft, verify, accept, commit, for a batch whose rows stand at positions of their own."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance import Accepted, accept
from lin_jax.decoding.drafters import DraftContext, Drafter
from lin_jax.decoding.sampling import Sampling, choose
from lin_jax.decoding.tree import DraftTree
from lin_jax.models import CausalModel

# Who chose a token of the output.
PROMPT, TARGET, DRAFT = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoopState:
    """Everything that one step hands to the next.

    Attributes:
        model: the model's recurrent state; it has consumed every token but the last of each row.
        hidden: `[B, E]` the hidden vector from which the last token was chosen.
        tokens: `[B, C]` prompt and output.
        origin: `[B, C]` who chose each token: PROMPT, TARGET or DRAFT.
        length: `[B]` tokens so far.
        limit: `[B]` length at which a row ends.
        rows: `[B]` number of each sequence among all that are decoded; it keys the random numbers.
        seed: of the random numbers.
        finished: `[B]` rows that are done.
        steps: `[B]` target steps taken.
        yields: `[P]` how often a step emitted 1, 2, ... tokens, over all rows.
    """

    model: Any
    hidden: Float[Array, "B E"]
    tokens: Int[Array, "B C"]
    origin: Int[Array, "B C"]
    length: Int[Array, " B"]
    limit: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    finished: Bool[Array, " B"]
    steps: Int[Array, " B"]
    yields: Int[Array, " P"]


@partial(jax.jit, donate_argnames=("state", "hidden"))
def prefill_piece(
    model: CausalModel, state: Any, hidden: Float[Array, "B E"], tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Any, Float[Array, "B E"]]:
    """Consumes one piece of every prompt, `lengths` tokens of each row: the state, and the last hidden vector."""
    outputs, state = model.prefill(tokens, lengths, state)
    last = jnp.take_along_axis(outputs, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return state, jnp.where((lengths > 0)[:, None], last, hidden)


@partial(jax.jit, static_argnames=("tree", "sampling", "end_tokens"), donate_argnames=("state",))
def start(
    model: CausalModel, state: LoopState, *, tree: DraftTree, sampling: Sampling, end_tokens: tuple[int, ...]
) -> LoopState:
    """Chooses the first token of every row from what the prefill left."""
    logits = model.logits(state.hidden[:, None])
    first = choose(logits, state.length[:, None], state.rows, state.seed, sampling)
    path = jnp.zeros((first.shape[0], tree.depth + 1), jnp.int32)
    accepted = Accepted(path, jnp.ones_like(state.length), jnp.broadcast_to(first, path.shape))
    return _emit(state, accepted, end_tokens)[0]


@partial(jax.jit, static_argnames=("tree", "sampling", "end_tokens"), donate_argnames=("state",))
def run(
    model: CausalModel,
    drafter: Drafter,
    state: LoopState,
    max_steps: Int[Array, ""],
    *,
    tree: DraftTree,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
) -> LoopState:
    """Steps until every row is finished, or `max_steps` are done."""

    def unfinished(carry: tuple[Array, LoopState]) -> Array:
        return (carry[0] < max_steps) & ~jnp.all(carry[1].finished)

    def body(carry: tuple[Array, LoopState]) -> tuple[Array, LoopState]:
        return carry[0] + 1, _step(model, drafter, carry[1], tree, sampling, end_tokens)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def _step(
    model: CausalModel,
    drafter: Drafter,
    state: LoopState,
    tree: DraftTree,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
) -> LoopState:
    """One target step: the tree is drafted, verified, its longest valid path accepted and committed."""
    root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    guesses = drafter.guess(DraftContext(state.hidden, state.tokens, state.length))
    tokens = tree.place(root, guesses)
    arrays = tree.arrays()
    hidden, nodes = model.verify(jnp.maximum(tokens, 0), arrays, state.model)
    targets = choose(model.logits(hidden), state.length[:, None] + arrays.depth, state.rows, state.seed, sampling)
    accepted = accept(tokens, targets, tree)
    state, count = _emit(state, accepted, end_tokens)
    last = jnp.take_along_axis(accepted.path, jnp.maximum(count - 1, 0)[:, None], axis=1)
    reached = jnp.take_along_axis(hidden, last[:, :, None], axis=1)[:, 0]
    return replace(
        state,
        model=model.commit(state.model, nodes, accepted.path, count),
        hidden=jnp.where((count > 0)[:, None], reached, state.hidden),
        steps=state.steps + (count > 0),
        yields=state.yields.at[jnp.maximum(count - 1, 0)].add(count > 0),
    )


def _emit(state: LoopState, accepted: Accepted, end_tokens: tuple[int, ...]) -> tuple[LoopState, Int[Array, " B"]]:
    """Writes the emitted tokens behind each row, up to its end; also how many there were."""
    order = jnp.arange(accepted.emitted.shape[1])
    ends = jnp.isin(accepted.emitted, jnp.asarray(end_tokens, jnp.int32))
    ended_before = jnp.cumsum(ends, axis=1) - ends > 0
    room = state.limit - state.length
    kept = (order < accepted.length[:, None]) & ~ended_before & (order < room[:, None]) & ~state.finished[:, None]
    count = jnp.sum(kept, axis=1)
    slots = jnp.where(kept, state.length[:, None] + order, state.tokens.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]
    origin = jnp.where(order < accepted.length[:, None] - 1, DRAFT, TARGET).astype(state.origin.dtype)
    written = replace(
        state,
        tokens=state.tokens.at[rows, slots].set(accepted.emitted, mode="drop"),
        origin=state.origin.at[rows, slots].set(origin, mode="drop"),
        length=state.length + count,
        finished=state.finished | jnp.any(ends & kept, axis=1) | (state.length + count >= state.limit),
    )
    return written, count
