"""Replay of texts that the model wrote itself, token by token, to measure what a drafter would have guessed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lin_jax.attention import tree_arrays
from lin_jax.decoding.drafting.api import DraftContext, Drafter, TreeLevel
from lin_jax.decoding.drafting.dynamic_tree import DynamicTree
from lin_jax.decoding.engine.prefill import DecodeState, append_recent, init_decode_state, prefill
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.engine.slots import bucket
from lin_jax.errors import UserError
from lin_jax.models import CausalModel

# Rank of a node that a dynamic tree does not find.
NOT_FOUND = np.iinfo(np.int32).max


def draft_accuracy(
    model: CausalModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    depth: int,
) -> Bool[np.ndarray, "B P D R"]:
    """Mask of a drafter's right guesses, by text B, position P, depth D and rank R.

    At depth d the drafter guesses after the right tokens up to there, so that a path of ranks is right exactly if all
    its ranks are hits.

    Args:
        model: the model.
        drafter: the drafter.
        prompts: token ids before each text.
        texts: the model's own continuations, all of one length.
        depth: largest depth D.
    """
    return _replayed(model, drafter, prompts, texts, depth, None)


def dynamic_tree_ranks(
    model: CausalModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    tree: DynamicTree,
) -> Int[np.ndarray, "B P L D"]:
    """Rank of the right node of each depth D among a dynamic tree's candidates, NOT_FOUND if it is not one.

    There is one result for each depth L that a tree may stop at. A tree of N nodes with the same beam and width holds
    the node if its rank is below N. Arguments as in `draft_accuracy`.
    """
    return _replayed(model, drafter, prompts, texts, tree.depth, tree)


def _replayed(
    model: CausalModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    depth: int,
    tree: DynamicTree | None,
) -> np.ndarray:
    length = min((len(text) for text in texts), default=0)
    if length <= depth + 1:
        raise UserError(f"texts of {length} tokens are too short for a draft tree of depth {depth}; give longer ones")
    # Equal lengths and a capacity that is a power of two: other texts share the program.
    truth = jnp.asarray([list(text[:length]) for text in texts], jnp.int32)
    capacity = bucket(max(len(prompt) for prompt in prompts) + length, 64)
    decode_state = init_decode_state(model, drafter, len(prompts), capacity, seen=False)
    decode_state = prefill(Flat.of(model, drafter), decode_state, prompts, 256)
    return np.moveaxis(np.asarray(_scan(model, drafter, decode_state, truth, depth=depth, tree=tree)), 0, 1)


def tokens_per_step(accepted: Int[np.ndarray, "B P"]) -> float:
    """Mean tokens per step, given the number of accepted draft tokens after each position of the texts.

    Steps follow each other: the next one begins after the last accepted token. The mean over all positions would be
    larger, as most of them lie inside passages that are easy to guess.
    """
    tokens = steps = 0
    for row in accepted.tolist():
        place = 0
        while place < len(row):
            tokens, steps, place = tokens + row[place] + 1, steps + 1, place + row[place] + 1
    return tokens / steps


@partial(jax.jit, static_argnames=("depth", "tree"))
def _scan(
    model: CausalModel,
    drafter: Drafter,
    decode_state: DecodeState,
    texts: Int[Array, "B T"],
    *,
    depth: int,
    tree: DynamicTree | None,
) -> Array:
    """Results `[T - depth - 1, B, ...]` with each token of the texts but the last as the root."""
    root_only = tree_arrays((-1,))
    batch = texts.shape[0]
    ones, first = jnp.ones(batch, jnp.int32), jnp.zeros((batch, 1), jnp.int32)

    def step(decode_state: DecodeState, index: Array) -> tuple[DecodeState, Array]:
        truth = jax.lax.dynamic_slice_in_dim(texts, index, depth + 1, axis=1)
        recent = append_recent(decode_state.recent, truth, ones)
        context = DraftContext(truth[:, 0], decode_state.hidden, recent, decode_state.model)
        if tree is None:
            found = _right_guesses(drafter, context, decode_state.drafter, truth)
        else:
            found = _right_node_ranks(tree, drafter, context, decode_state.drafter, truth)
        hidden, nodes = model.verify(truth[:, :1], root_only, decode_state.model)
        after = DecodeState(
            model=model.commit(decode_state.model, nodes, first, ones),
            drafter=drafter.commit(decode_state.drafter, truth[:, :1], ones),
            hidden=hidden[:, 0],
            recent=recent,
            seen=None,
        )
        return after, found

    return jax.lax.scan(step, decode_state, jnp.arange(texts.shape[1] - depth - 1))[1]


def _right_guesses(
    drafter: Drafter, context: DraftContext, state: object, truth: Int[Array, "B D"]
) -> Bool[Array, "B D R"]:
    """Mask of the right guesses at each depth, the drafter being led along the true tokens."""
    shared, carried = drafter.begin(context, state)
    hits = []
    for depth in range(truth.shape[1] - 1):
        chain = tree_arrays(tuple(range(-1, depth)))
        here = truth[:, depth : depth + 1]
        level = TreeLevel(here, depth, drafter.width, None, False, truth[:, : depth + 1], chain)
        guesses, carried = drafter.expand(shared, carried, level)
        hits.append(guesses.tokens[:, 0] == truth[:, depth + 1, None])
    return jnp.stack(hits, axis=1)


def _right_node_ranks(
    tree: DynamicTree, drafter: Drafter, context: DraftContext, state: object, truth: Int[Array, "B D"]
) -> Int[Array, "B L D"]:
    """Rank of the true node of each depth among the candidates, for trees that stop at each depth L."""
    tokens, joint, parents = tree.candidates(drafter, context, state)
    index = jnp.arange(tokens.shape[1])
    node = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    there = jnp.ones(tokens.shape[0], bool)
    path, found = [], []
    for depth in range(1, truth.shape[1]):
        right = (tokens == truth[:, depth, None]) & (parents == node) & (index > 0) & jnp.isfinite(joint)
        there = there & jnp.any(right, axis=1)
        node = jnp.argmax(right, axis=1)[:, None]
        path.append(node)
        found.append(there)
    nodes, known = jnp.concatenate(path, axis=1), jnp.stack(found, axis=1)
    # `grow` takes the likeliest nodes first, of equals the earliest; the root before all.
    own = jnp.take_along_axis(joint, nodes, axis=1)[:, :, None]
    sooner = (joint[:, None] > own) | ((joint[:, None] == own) & (index < nodes[:, :, None]))
    counted = jnp.cumsum(sooner.at[:, :, 0].set(True), axis=2)
    # Levels come one after the other: the candidates of a tree that stops earlier are the first of these.
    ends = [replace(tree, size=2, depth=max_depth).max_size - 1 for max_depth in range(1, truth.shape[1])]
    return jnp.where(known[:, None], jnp.moveaxis(counted[:, :, np.array(ends)], 2, 1), NOT_FOUND)
