"""Lossless acceptance of drafts that were drawn from the drafter's own distribution, several for one place.

After Miao et al. 2023 (SpecInfer) and Yang et al. 2024 (Multi-candidate speculative decoding): a node's children are
drawn one after the other without replacement, and tried in that order; what a rejected child stood for is taken out of
both distributions. The output is distributed as plain sampling's, whatever the drafter's distribution is. The children
must have been drawn: the most probable tokens, accepted by the same rule, would give a biased output.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance import Accepted
from lin_jax.decoding.sampling import token_key

if TYPE_CHECKING:  # trees draw their children here
    from lin_jax.decoding.tree import DraftTree

# Folded into the keys, so that drawing and accepting use other random numbers than the target's own choice.
_ACCEPTING, _DRAWING = 1, 2


def accept_drawn(
    tokens: Int[Array, "B N"],
    log_q: Float[Array, "B I V"],
    log_p: Float[Array, "B N V"],
    positions: Int[Array, " B"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    tree: "DraftTree",
) -> Accepted:
    """Goes down from the root while a child is accepted; then the target draws from what is left of its distribution.

    A child x is accepted with probability min(1, p(x) / q(x)). If it is not, p becomes norm(max(p - q, 0)) and q loses
    x. Random numbers depend on seed, row, the position of the token to be chosen and the number of the child. The
    target's own draw uses those of plain sampling, so that a row without drafts gets plain sampling's token.

    Args:
        tokens: `[B, N]` the tree's tokens, -1 where there is no draft.
        log_q: `[B, I, V]` normalised log-probabilities from which the children of each of the I nodes that have some,
            in node order, were drawn one after the other without replacement.
        log_p: `[B, N, V]` the target's normalised log-probabilities after each node, filtered as for sampling.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` number of each sequence among all that are decoded.
        seed: of all random numbers.
        tree: the tree's shape.
    """
    children, internal = _family(tree)
    batch = jnp.arange(tokens.shape[0])
    node, length = jnp.zeros_like(batch), jnp.ones_like(batch)
    goes_on = jnp.ones(batch.shape, bool)
    left = jnp.exp(_wide(log_p[:, 0]))
    path: list[Array] = [node]
    chosen: list[Array] = []
    for depth in range(tree.depth):
        q, drafts = jnp.exp(_wide(log_q[batch, internal[node]])), children[depth][node]
        uniforms = _uniforms(positions + depth, rows, seed, drafts.shape[1], left)
        drafted = jnp.where(drafts >= 0, tokens[batch[:, None], drafts], -1)
        slot, left = _try_children(left, q, jnp.where(goes_on[:, None], drafted, -1), uniforms)
        goes_on = slot >= 0
        node = jnp.where(goes_on, drafts[batch, slot], node)
        left = jnp.where(goes_on[:, None], jnp.exp(_wide(log_p[batch, node])), left)
        length, path, chosen = length + goes_on, [*path, node], [*chosen, drafted[batch, slot]]

    def last(row: Array, position: Array, probabilities: Array) -> Array:
        noise = jax.random.gumbel(token_key(seed, row, position), probabilities.shape, probabilities.dtype)
        return jnp.argmax(jnp.log(probabilities) + noise).astype(jnp.int32)

    end = jax.vmap(last)(rows, positions + length - 1, left)
    drawn = jnp.stack([*chosen, end], axis=1)
    emitted = jnp.where(jnp.arange(drawn.shape[1]) < length[:, None] - 1, drawn, end[:, None])
    return Accepted(jnp.stack(path, axis=1).astype(jnp.int32), length.astype(jnp.int32), emitted.astype(jnp.int32))


def draw_children(
    log_q: Float[Array, "B K V"],
    count: int,
    positions: Int[Array, " B"],
    rows: Int[Array, " B"],
    nodes: Int[Array, " K"] | tuple[int, ...],
    seed: UInt[Array, ""],
) -> Int[Array, "B K count"]:
    """Draws the children of some nodes, one after the other without replacement.

    The tokens with the largest log-probabilities plus Gumbel noise, in that order, are such a draw (Kool et al. 2019).

    Args:
        log_q: `[B, K, V]` the drafter's log-probabilities after each of the nodes.
        count: how many children each gets.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` number of each sequence among all that are decoded.
        nodes: `[K]` numbers of the nodes in their tree.
        seed: of all random numbers.

    Returns:
        `[B, K, count]` tokens; -1 where fewer than `count` have a probability above zero.
    """

    def noise(row: Array, position: Array, node: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(token_key(seed, row, position), _DRAWING), node)
        return jax.random.gumbel(key, log_q.shape[-1:], _wide(log_q).dtype)

    keyed = jax.vmap(jax.vmap(noise, (None, None, 0)), (0, 0, None))(rows, positions, jnp.asarray(nodes, jnp.int32))
    available = min(count, log_q.shape[-1])
    best, drawn = jax.lax.top_k(log_q + keyed, available)
    drawn = jnp.where(best > -jnp.inf, drawn, -1).astype(jnp.int32)
    return jnp.pad(drawn, ((0, 0), (0, 0), (0, count - available)), constant_values=-1)


def _wide(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32 or better."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _family(tree: "DraftTree") -> tuple[list[Int[Array, "N W"]], Int[Array, " N"]]:
    """Of every node: its children if it is at depth 0, 1, ..., else -1; and its number among those that have children.

    The width W of a depth is the largest number of children there; leaves have the number 0, which nothing reads.
    """
    depths = np.array([0, *map(len, tree.paths)])
    kin = [[child for child, parent in enumerate(tree.parents) if parent == node] for node in range(tree.size)]
    tables = []
    for depth in range(tree.depth):
        width = max(len(kin[node]) for node in np.flatnonzero(depths == depth))
        table = np.full((tree.size, width), -1, np.int32)
        for node in np.flatnonzero(depths == depth):
            table[node, : len(kin[node])] = kin[node]
        tables.append(jnp.asarray(table))
    having = np.array([bool(children) for children in kin])
    return tables, jnp.asarray(np.where(having, np.cumsum(having) - 1, 0))


def _uniforms(
    positions: Int[Array, " B"], rows: Int[Array, " B"], seed: UInt[Array, ""], count: int, like: Float[Array, "B V"]
) -> Float[Array, "B W"]:
    """What decides about each of `count` children."""

    def uniform(row: Array, position: Array, child: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(token_key(seed, row, position), _ACCEPTING), child)
        return jax.random.uniform(key, (), like.dtype)

    return jax.vmap(jax.vmap(uniform, (None, None, 0)), (0, 0, None))(rows, positions, jnp.arange(count))


def _try_children(
    p: Float[Array, "B V"], q: Float[Array, "B V"], drafted: Int[Array, "B W"], uniforms: Float[Array, "B W"]
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """Tries one node's children in turn: which is accepted, -1 if none, and what the rejected ones leave of p."""
    batch = jnp.arange(p.shape[0])

    def attempt(carry: tuple[Array, Array, Array], item: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        p, q, accepted = carry
        slot, token, uniform = item
        q_token = q[batch, token]
        # A token of which q has nothing left was not drawn from it.
        tried = (accepted < 0) & (token >= 0) & (q_token > 0)
        stands = uniform * q_token < p[batch, token]
        p, q = _reject(p, q, token, tried & ~stands)
        return (p, q, jnp.where(tried & stands, slot, accepted)), None

    none = jnp.full(p.shape[0], -1, jnp.int32)
    items = (jnp.arange(drafted.shape[1], dtype=jnp.int32), drafted.T, uniforms.T)
    (p, _, accepted), _ = jax.lax.scan(attempt, (p, q, none), items)
    return accepted, p


def _reject(
    p: Float[Array, "B V"], q: Float[Array, "B V"], token: Int[Array, " B"], rejected: Bool[Array, " B"]
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """Both distributions after the rejection of a token, in the rows where it was rejected."""
    more = jnp.maximum(p - q, 0)
    total = jnp.sum(more, axis=1, keepdims=True)
    # Where p equals q up to rounding nothing is left, and p is as good an answer.
    p_after = jnp.where(total > 0, more / jnp.where(total > 0, total, 1), p)
    others = q.at[jnp.arange(q.shape[0]), token].set(0)
    rest = jnp.sum(others, axis=1, keepdims=True)
    q_after = others / jnp.where(rest > 0, rest, 1)
    return jnp.where(rejected[:, None], p_after, p), jnp.where(rejected[:, None], q_after, q)
