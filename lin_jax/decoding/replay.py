"""Going through texts that the model wrote itself, token by token, to see what a drafter would have guessed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lin_jax.attention import tree_arrays
from lin_jax.decoding.draft import DraftContext, Drafter, Layer
from lin_jax.decoding.dynamic import DynamicTree
from lin_jax.decoding.reading import Reading, nothing_read, pushed, read
from lin_jax.decoding.slots import bucket
from lin_jax.errors import UserError
from lin_jax.models import CausalModel

NOWHERE = np.iinfo(np.int32).max


def measure_hits(
    model: CausalModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    depth: int,
) -> Bool[np.ndarray, "B P D R"]:
    """Which of a drafter's guesses would have been right, at every position P of the texts B.

    At depth d the drafter is asked behind the right tokens up to there, so that a path of ranks is right exactly if all
    its ranks are hits.

    Args:
        model: the model.
        drafter: the drafter.
        prompts: what each text was an answer to.
        texts: the model's own continuations, all of one length.
        depth: how deep to look.
    """
    return _replayed(model, drafter, prompts, texts, depth, None)


def measure_places(
    model: CausalModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    tree: DynamicTree,
) -> Int[np.ndarray, "B P L D"]:
    """How early dynamic trees take in the node of each depth that would have been right, NOWHERE if not at all.

    There is one finding for each depth L that a tree may stop at. A tree of N nodes that is grown alike holds the node
    if the place is below N. Arguments as in `measure_hits`.
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
        raise UserError("the texts are too short to choose a draft tree by; give longer ones")
    # A power of two of equal lengths: other texts share the program.
    told = jnp.asarray([list(text[:length]) for text in texts], jnp.int32)
    capacity = bucket(max(len(prompt) for prompt in prompts) + length, 64)
    reading = nothing_read(model, drafter, len(prompts), capacity, seen=False)
    reading = read(model, drafter, reading, prompts, 256)
    return np.moveaxis(np.asarray(_scan(model, drafter, reading, told, depth=depth, tree=tree)), 0, 1)


def tokens_per_step(accepted: Int[np.ndarray, "B P"]) -> float:
    """What a step yields on average, if so many drafted tokens stand behind each position of the texts.

    Steps follow each other: the next one begins behind what was accepted. The mean over all positions would be larger,
    as most of them lie inside of what is easy to guess.
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
    reading: Reading,
    texts: Int[Array, "B T"],
    *,
    depth: int,
    tree: DynamicTree | None,
) -> Array:
    """The findings `[T - depth - 1, B, ...]` with each token of the texts but the last as the root."""
    root_only = tree_arrays((-1,))
    batch = texts.shape[0]
    ones, first = jnp.ones(batch, jnp.int32), jnp.zeros((batch, 1), jnp.int32)

    def step(reading: Reading, index: Array) -> tuple[Reading, Array]:
        told = jax.lax.dynamic_slice_in_dim(texts, index, depth + 1, axis=1)
        recent = pushed(reading.recent, told, ones)
        context = DraftContext(told[:, 0], reading.hidden, recent, reading.model)
        if tree is None:
            found = _hits(drafter, context, reading.drafter, told)
        else:
            found = _places(tree, drafter, context, reading.drafter, told)
        hidden, nodes = model.verify(told[:, :1], root_only, reading.model)
        after = Reading(
            model=model.commit(reading.model, nodes, first, ones),
            drafter=drafter.commit(reading.drafter, told[:, :1], ones),
            hidden=hidden[:, 0],
            recent=recent,
            seen=None,
        )
        return after, found

    return jax.lax.scan(step, reading, jnp.arange(texts.shape[1] - depth - 1))[1]


def _hits(drafter: Drafter, context: DraftContext, state: object, told: Int[Array, "B D"]) -> Bool[Array, "B D R"]:
    shared, carried = drafter.begin(context, state)
    hits = []
    for depth in range(told.shape[1] - 1):
        chain = tree_arrays(tuple(range(-1, depth)))
        here = told[:, depth : depth + 1]
        layer = Layer(here, depth, drafter.width, None, False, told[:, : depth + 1], chain)
        guesses, carried = drafter.expand(shared, carried, layer)
        hits.append(guesses.tokens[:, 0] == told[:, depth + 1, None])
    return jnp.stack(hits, axis=1)


def _places(
    tree: DynamicTree, drafter: Drafter, context: DraftContext, state: object, told: Int[Array, "B D"]
) -> Int[Array, "B L D"]:
    tokens, joint, parents = tree.candidates(drafter, context, state)
    index = jnp.arange(tokens.shape[1])
    node = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    there = jnp.ones(tokens.shape[0], bool)
    path, found = [], []
    for depth in range(1, told.shape[1]):
        right = (tokens == told[:, depth, None]) & (parents == node) & (index > 0) & jnp.isfinite(joint)
        there = there & jnp.any(right, axis=1)
        node = jnp.argmax(right, axis=1)[:, None]
        path.append(node)
        found.append(there)
    nodes, known = jnp.concatenate(path, axis=1), jnp.stack(found, axis=1)
    # `grow` takes the likeliest nodes in first, of equals the earliest; the root before all.
    own = jnp.take_along_axis(joint, nodes, axis=1)[:, :, None]
    sooner = (joint[:, None] > own) | ((joint[:, None] == own) & (index < nodes[:, :, None]))
    counted = jnp.cumsum(sooner.at[:, :, 0].set(True), axis=2)
    # Layers come one after the other: a tree that stops earlier has found the first of these.
    ends = [replace(tree, size=2, depth=deepest).most - 1 for deepest in range(1, told.shape[1])]
    return jnp.where(known[:, None], jnp.moveaxis(counted[:, :, np.array(ends)], 2, 1), NOWHERE)
