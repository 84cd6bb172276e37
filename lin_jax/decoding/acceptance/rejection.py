"""Multi-candidate rejection sampling: lossless acceptance of drafts sampled from the drafter's own distribution.

After Miao et al. 2023 (SpecInfer) and Yang et al. 2024 (Multi-candidate speculative decoding): a node's children are
drawn one after the other without replacement, and tried in that order; the probability of a rejected child is removed
from both distributions. The output has the distribution of plain sampling, whatever the drafter's distribution is. The
children must have been drawn: the most probable tokens, accepted by the same rule, would give a biased output.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from lin_jax.decoding.acceptance.longest_path import Accepted
from lin_jax.decoding.drafting.tree import DraftTree
from lin_jax.decoding.engine.sampling import ACCEPTANCE_KEY, token_key
from pallas_kernels.precision import upcast


def accept_drawn(
    tokens: Int[Array, "B N"],
    log_q: Float[Array, "B I V"],
    log_p: Float[Array, "B N V"],
    positions: Int[Array, " B"],
    rows: Int[Array, " B"],
    seed: UInt[Array, ""],
    tree: DraftTree,
) -> Accepted:
    """Walks down from the root while a child is accepted; then the target draws from its residual distribution.

    A child x is accepted with probability min(1, p(x) / q(x)). If it is not, p becomes norm(max(p - q, 0)) and q loses
    x. Random numbers depend on seed, row, the position of the token to be chosen and the number of the child. The
    target's own draw uses those of plain sampling, so that a row without drafts gets plain sampling's token.

    Args:
        tokens: `[B, N]` the tree's tokens, -1 where there is no draft.
        log_q: `[B, I, V]` normalised log-probabilities from which the children of each of the I internal nodes, in
            node order, were drawn one after the other without replacement.
        log_p: `[B, N, V]` the target's normalised log-probabilities after each node, filtered as for sampling.
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` index of each sequence among all that are decoded.
        seed: seed of all random numbers.
        tree: the tree's shape.
    """
    children, internal = _child_tables(tree)
    batch = jnp.arange(tokens.shape[0])
    node, length = jnp.zeros_like(batch), jnp.ones_like(batch)
    active = jnp.ones(batch.shape, bool)
    residual = jnp.exp(upcast(log_p[:, 0]))
    path: list[Array] = [node]
    chosen: list[Array] = []
    for depth in range(tree.depth):
        q, drafts = jnp.exp(upcast(log_q[batch, internal[node]])), children[depth][node]
        uniforms = _uniforms(positions + depth, rows, seed, drafts.shape[1], residual)
        drafted = jnp.where(drafts >= 0, tokens[batch[:, None], drafts], -1)
        slot, residual = _try_children(residual, q, jnp.where(active[:, None], drafted, -1), uniforms)
        active = slot >= 0
        node = jnp.where(active, drafts[batch, slot], node)
        residual = jnp.where(active[:, None], jnp.exp(upcast(log_p[batch, node])), residual)
        length, path, chosen = length + active, [*path, node], [*chosen, drafted[batch, slot]]

    def last(row: Array, position: Array, probabilities: Array) -> Array:
        noise = jax.random.gumbel(token_key(seed, row, position), probabilities.shape, probabilities.dtype)
        return jnp.argmax(jnp.log(probabilities) + noise).astype(jnp.int32)

    end = jax.vmap(last)(rows, positions + length - 1, residual)
    drawn = jnp.stack([*chosen, end], axis=1)
    emitted = jnp.where(jnp.arange(drawn.shape[1]) < length[:, None] - 1, drawn, end[:, None])
    return Accepted(jnp.stack(path, axis=1).astype(jnp.int32), length.astype(jnp.int32), emitted.astype(jnp.int32))


def _child_tables(tree: DraftTree) -> tuple[list[Int[Array, "N W"]], Int[Array, " N"]]:
    """Child tables, one per depth 0, 1, ..., and each node's index among the internal nodes.

    A table has a row per node: its children if the node is at that depth, -1 elsewhere. The width W of a depth is the
    largest number of children there; leaves have the index 0, which nothing reads.
    """
    depths = np.array([0, *map(len, tree.paths)])
    children_of = [[child for child, parent in enumerate(tree.parents) if parent == node] for node in range(tree.size)]
    tables = []
    for depth in range(tree.depth):
        width = max(len(children_of[node]) for node in np.flatnonzero(depths == depth))
        table = np.full((tree.size, width), -1, np.int32)
        for node in np.flatnonzero(depths == depth):
            table[node, : len(children_of[node])] = children_of[node]
        tables.append(jnp.asarray(table))
    having = np.array([bool(children) for children in children_of])
    return tables, jnp.asarray(np.where(having, np.cumsum(having) - 1, 0))


def _uniforms(
    positions: Int[Array, " B"], rows: Int[Array, " B"], seed: UInt[Array, ""], count: int, like: Float[Array, "B V"]
) -> Float[Array, "B W"]:
    """Uniform random numbers that decide about each of `count` children."""

    def uniform(row: Array, position: Array, child: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(token_key(seed, row, position), ACCEPTANCE_KEY), child)
        return jax.random.uniform(key, (), like.dtype)

    return jax.vmap(jax.vmap(uniform, (None, None, 0)), (0, 0, None))(rows, positions, jnp.arange(count))


def _try_children(
    p: Float[Array, "B V"], q: Float[Array, "B V"], drafted: Int[Array, "B W"], uniforms: Float[Array, "B W"]
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """Tries one node's children in turn; returns the accepted one's slot, -1 if none, and the residual of p."""
    batch = jnp.arange(p.shape[0])

    def attempt(carry: tuple[Array, Array, Array], item: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        p, q, accepted = carry
        slot, token, uniform = item
        q_token = q[batch, token]
        # A token to which q gives no probability was not drawn from it.
        tried = (accepted < 0) & (token >= 0) & (q_token > 0)
        accepts = uniform * q_token < p[batch, token]
        p, q = _reject(p, q, token, tried & ~accepts)
        return (p, q, jnp.where(tried & accepts, slot, accepted)), None

    none = jnp.full(p.shape[0], -1, jnp.int32)
    items = (jnp.arange(drafted.shape[1], dtype=jnp.int32), drafted.T, uniforms.T)
    (p, _, accepted), _ = jax.lax.scan(attempt, (p, q, none), items)
    return accepted, p


def _reject(
    p: Float[Array, "B V"], q: Float[Array, "B V"], token: Int[Array, " B"], rejected: Bool[Array, " B"]
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """Residual distributions p and q after the rejection of a token, in the rows where it was rejected."""
    more = jnp.maximum(p - q, 0)
    total = jnp.sum(more, axis=1, keepdims=True)
    # Where p equals q up to rounding nothing is left, and p is as good an answer.
    p_after = jnp.where(total > 0, more / jnp.where(total > 0, total, 1), p)
    others = q.at[jnp.arange(q.shape[0]), token].set(0)
    rest = jnp.sum(others, axis=1, keepdims=True)
    q_after = others / jnp.where(rest > 0, rest, 1)
    return jnp.where(rejected[:, None], p_after, p), jnp.where(rejected[:, None], q_after, q)
