"""Verification and prefill that add up in one order, whatever the number of nodes and of texts.

A sum of floating-point numbers depends on its order. A tree verified as one score matrix adds a node's ancestors where
plain decoding adds tokens of the state, and programs for other sizes may be written otherwise by the compiler. Here,
every node is a text of its own: the path to it is committed to a copy of the state, as plain decoding would, and then
the one node is verified, as plain decoding does. Nodes are computed in blocks of one size, and texts one by one, each
behind a condition that is always true: the compiler, which may write a computation differently for what stands beside
it, cannot look through that, and a barrier would be gone before it does so.

The price: copies of the state for each node, layers run twice, and blocks that may be half empty.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention import TreeArrays, gather_nodes, max_draft_depth, tree_arrays
from pallas_kernels.ordering import truth

# Nodes of a block: what is computed has the same shapes for any number of nodes.
BLOCK = 8


class Model(Protocol):
    """The part of a causal model that is needed here."""

    config: Any
    nodes_read_parents: bool

    def begin(self, tokens: Array, positions: Array) -> tuple[Array, Any]:
        """As in `CausalModel`."""

    def outputs(self, x: Array) -> Array:
        """As in `CausalModel`."""

    def position(self, state: Any) -> Array:
        """As in `CausalModel`."""

    def run(self, apply: Callable[[Any, Array, Any], tuple[Array, Any]], x: Array, state: Any) -> tuple[Array, Any]:
        """As in `CausalModel`."""


def verify_nodes(
    model: Model, tokens: Int[Array, "B N"], tree: TreeArrays, state: Any
) -> tuple[Float[Array, "B N E"], Any]:
    """Hidden vectors of a tree's nodes, and the nodes for `commit`; arguments as in `CausalModel.verify`."""
    batch, count = tokens.shape
    rows = batch * count
    depth = jnp.broadcast_to(tree.depth, (batch, count))
    paths = _paths(model, jnp.broadcast_to(tree.ancestors, (batch, count, count)), depth)
    always = model.position(state)[0] >= 0

    def flat(leaf: Array) -> Array:
        """Rows of nodes `[R, ...]` from `[B, N, ...]`."""
        return leaf.reshape(rows, *leaf.shape[2:])

    def nodes_of(leaf: Array) -> Array:
        """`[B, N, ...]` from what is computed for rows of one node each."""
        return leaf.reshape(batch, count, *leaf.shape[2:])

    positions = model.position(state)[:, None] + depth
    x, context = in_blocks(lambda own: model.begin(*own), (flat(tokens)[:, None], flat(positions)[:, None]), always)
    root = tree_arrays((-1,))

    def on_paths(block: Any, before: Any, nodes: Any) -> Any:
        """The state that each node stands on: the one before the tree, and the path to the node."""
        if count == 1:
            return before
        each = jax.vmap(lambda path: gather_nodes(nodes, path), in_axes=1, out_axes=1)(paths)
        return in_blocks(lambda own: block.commit(*own), (before, jax.tree.map(flat, each), flat(depth)), always)

    def step(block: Any, x: Array, layer: Any) -> tuple[Array, Any]:
        before = jax.tree.map(lambda leaf: flat(jnp.repeat(leaf[:, None], count, axis=1)), layer)
        above = before
        # What is committed of a node depends on the input of the layer, and perhaps on its parent's: what a first
        # round commits of that is right, and so is all that a second one finds.
        for _ in range(2 if model.nodes_read_parents and count > 1 else 1):
            found = in_blocks(lambda own: block.verify(own[0], own[1], root, own[2])[1], (x, context, above), always)
            nodes = jax.tree.map(nodes_of, found)
            above = on_paths(block, before, nodes)
        return in_blocks(lambda own: block.verify(own[0], own[1], root, own[2])[0], (x, context, above), always), nodes

    x, nodes = model.run(step, x, state)
    return nodes_of(in_blocks(model.outputs, x, always)), nodes


def in_blocks(function: Callable[[Any], Any], rows: Any, always: Array) -> Any:
    """Applies a function to rows, a block at a time, so that nothing around it changes how it is computed.

    Args:
        function: from rows to rows.
        rows: a tree with leaves `[R, ...]`.
        always: true, which the compiler does not know.
    """
    count = jax.tree.leaves(rows)[0].shape[0]

    def filled(leaf: Array) -> Array:
        leaf = jnp.pad(leaf, [(0, -count % BLOCK)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return leaf.reshape(-1, BLOCK, *leaf.shape[1:])

    blocks = jax.tree.map(filled, rows)
    if count <= BLOCK:
        found = alone(function, jax.tree.map(lambda leaf: leaf[0], blocks), always)
    else:
        each = jax.lax.map(lambda block: alone(function, block, always), blocks)
        found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), each)
    return jax.tree.map(lambda leaf: leaf[:count], found)


def alone(function: Callable[[Any], Any], given: Any, always: Array) -> Any:
    """Applies a function as a computation of its own; `always` as in `in_blocks`."""
    shapes = jax.eval_shape(function, given)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.cond(always, function, lambda _: nothing, given)


def logits_of(head: Callable[[Array], Array], hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
    """Applies a head to hidden vectors, a block at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return in_blocks(head, rows, truth(rows)).reshape(*hidden.shape[:-1], -1)


def _paths(model: Model, ancestors: Array, depth: Int[Array, "B N"]) -> Int[Array, "B N P"]:
    """The nodes on the way to each node, from the root on, without itself; what follows them does not matter."""
    count = depth.shape[1]
    above = ancestors & ~jnp.eye(count, dtype=bool)
    order = jnp.argsort(jnp.where(above, depth[:, None], count), axis=-1)
    deepest = max_draft_depth(model.config.attention)
    return order[..., : max(min(count - 1, count if deepest is None else deepest), 1)]


def prefill_rows(
    parallel: Callable[[Array, Array, Any], tuple[Array, Any]],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: Any,
) -> tuple[Float[Array, "B T E"], Any]:
    """Reads texts one by one.

    Args:
        parallel: reads a batch of texts: tokens, their lengths and the state before to hidden vectors and the state.
        tokens: `[B, T]`.
        lengths: `[B]`.
        state: the state before, leaves `[L, B, ...]`.
    """

    def one(row: tuple[Array, Array, Any]) -> tuple[Array, Any]:
        return alone(read, row, row[1] >= 0)

    def read(row: tuple[Array, Array, Any]) -> tuple[Array, Any]:
        tokens, length, before = row
        before = jax.tree.map(lambda leaf: leaf[:, None], before)
        hidden, after = parallel(tokens[None], length[None], before)
        return hidden[0], jax.tree.map(lambda leaf: leaf[:, 0], after)

    first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state)
    hidden, after = jax.lax.map(one, (tokens, lengths, first))
    return hidden, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), after)
