"""A start of the memory behind a window, fitted to a softmax teacher's queries, keys and values.

Softmax weighs a far token by `exp(c q·k)`. A memory whose features do not come near that size starts dead: its share
of the normaliser is nothing beside the window's, and so is its gradient. The fit takes the teacher's vectors of a few
rows, and sets for each head

* the centres of `Clustered` features: those of the keys (k-means, Lloyd 1982), and the temperature of the queries;
* the balance: such that the memory's mean share of the normaliser is the teacher's mean share of what lies outside of
  the window, or a part of it.

Of a few temperatures and parts, each head gets the pair whose outputs are closest to the teacher's. With a part of
one, the mean share is the teacher's; a memory that is coarse does better with less, but never gets nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lin_jax.attention.decay import Decay
from lin_jax.attention.feature_maps import Clustered, FeatureMap
from lin_jax.attention.layout import Layout
from lin_jax.attention.windowed_attention import WindowedAttention
from pallas_kernels.pairs import EXACT, pair_scores, split_heads, weighted_values
from pallas_kernels.precision import upcast
from pallas_kernels.types import QKV
from pallas_kernels.windows.window import NearFarMasks

# Parts of the teacher's mean share that the memory may start with, and factors of queries' scores of the centres.
PARTS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Queries of a row, and keys of all rows, that are looked at, at most.
QUERIES, KEYS = 256, 4096
_ROUNDS, _HALVINGS = 12, 40
# Balances that are tried, and the logarithm of no weight at all, in float32.
_LARGEST, _NOTHING = 500.0, -1e30


class MemoryShares(NamedTuple):
    """Mean shares of the normaliser, over queries that something lies before the window of, for each query head.

    Attributes:
        teacher: of the tokens outside of the window, in the teacher's softmax.
        before: of the memory, as it stood.
        after: of the memory, fitted.
    """

    teacher: Float[Array, "K R"]
    before: Float[Array, "K R"]
    after: Float[Array, "K R"]


class _Sums(NamedTuple):
    """Logarithms of summed weights, and mean values, of each query `[B, n, K, R]`."""

    total: Float[Array, "B n K R"]
    mean: Float[Array, "B n K R E"]


class _Rows(NamedTuple):
    """Rows of the teacher: `n` queries each, all keys and values, and what is near and far of each query."""

    queries: Float[Array, "B n K R D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    masks: NearFarMasks
    ages: Float[Array, "B n T K"] | None


def can_fit(mixer: nnx.Module) -> bool:
    """True for an attention whose window and memory share a normaliser, with a balance that can be fitted."""
    return isinstance(mixer, WindowedAttention) and mixer.balance is not None


def fit_memory(
    mixer: WindowedAttention,
    teacher: QKV,
    layout: Layout,
    key: Key[Array, ""],
    positions: Int[Array, "#B T"] | None = None,
) -> tuple[WindowedAttention, MemoryShares]:
    """The attention with a memory that starts close to a teacher, and the shares of its heads.

    Args:
        mixer: the attention, of one layer.
        teacher: queries `[B, T, H, D]`, keys `[B, T, K, D]` and values `[B, T, K, E]` of a few rows.
        layout: of the rows.
        key: draws the first centres.
        positions: those that queries and keys are turned by, for a memory that reads them as they were before; None
            takes the layout's.
    """
    assert mixer.balance is not None, "window and memory are balanced"
    rows = _sampled(mixer, teacher, layout)
    read = rows
    if mixer.turn is not None:
        at = layout.positions if positions is None else positions
        queries, keys = mixer.turn.back(teacher.queries, at), mixer.turn.back(teacher.keys, at)
        read = _sampled(mixer, QKV(queries, keys, teacher.values), layout)
    near, beyond = (_softmax_sums(rows, mask, mixer.scale) for mask in (rows.masks.near, _far(rows)))
    counted = jnp.any(_far(rows), axis=-1)[..., None, None]
    share = jnp.where(counted, jax.nn.sigmoid(beyond.total - near.total), 0)
    wanted = share[..., None] * beyond.mean + (1 - share)[..., None] * near.mean
    graph, maps = _candidates(mixer, read, layout, key)

    def tried(state: nnx.State) -> tuple[Array, Array, Array]:
        """Errors, balances and mean shares of a feature map, by the part of the teacher's share `[P, K, R]`."""
        far = _feature_sums(read, nnx.merge(graph, state))

        def with_part(part: Array) -> tuple[Array, Array, Array]:
            balance = _balance(near.total, far.total, part * _mean(share, counted), counted)
            own = _share(near.total, far.total, balance, counted)
            outputs = own[..., None] * far.mean + (1 - own)[..., None] * near.mean
            missed = jnp.where(counted[..., None], jnp.square(outputs - wanted), 0)
            return jnp.sum(missed, axis=(0, 1, 4)), balance, _mean(own, counted)

        return jax.lax.map(with_part, jnp.asarray(PARTS, share.dtype))

    tries = jax.lax.map(tried, maps)
    errors, balances, shares = (each.reshape(-1, *each.shape[2:]) for each in tries)
    best = jnp.argmin(errors, axis=0)
    fitted = nnx.merge(*nnx.split(mixer))
    fitted.linear.features = _with_choice(nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], maps)), maps, best)
    own = mixer.balance[...]
    fitted.balance = nnx.Param(_chosen(balances, best).astype(own.dtype))
    before = _share(near.total, _feature_sums(read, mixer.linear.features).total, upcast(own), counted)
    return fitted, MemoryShares(_mean(share, counted), _mean(before, counted), _chosen(shares, best))


def _sampled(mixer: WindowedAttention, teacher: QKV, layout: Layout) -> _Rows:
    """Some queries of each row, evenly spread, with all that comes before them."""
    queries, keys, values = (upcast(each) for each in teacher)
    step = -(-queries.shape[1] // QUERIES)
    at = jnp.arange(step - 1, queries.shape[1], step)
    together = layout.segment_ids[:, at, None] == layout.segment_ids[:, None, :]
    together = together & layout.valid[:, at, None] & layout.valid[:, None, :]
    masks = mixer.window.masks(layout.positions[:, at], layout.positions, together)
    return _Rows(split_heads(queries[:, at], mixer.kv_heads), keys, values, masks, _ages(mixer.decay, values, at))


def _ages(decay: Decay | None, values: Float[Array, "B T K E"], at: Int[Array, " n"]) -> Float[Array, "B n T K"] | None:
    """Logarithms of what is left of every token at some queries."""
    if decay is None:
        return None
    clock = jnp.cumsum(decay.logarithms(values), axis=1)
    return clock[:, at, None] - clock[:, None]


def _far(rows: _Rows) -> Bool[Array, "B n T"]:
    assert rows.masks.far is not None, "masks of whole rows"
    return rows.masks.far


def _softmax_sums(rows: _Rows, mask: Bool[Array, "B n T"], scale: float) -> _Sums:
    """Sums over what a mask allows, with the teacher's weights; row by row, so that few pairs are held at once."""

    def row(each: tuple[Array, Array, Array, Array]) -> _Sums:
        queries, keys, values, allowed = each
        scores = jnp.where(allowed[None, None], pair_scores(queries, keys) * scale, _NOTHING)
        return _summed(scores, allowed, values)

    return jax.lax.map(row, (rows.queries, rows.keys, rows.values, mask))


def _feature_sums(rows: _Rows, features: FeatureMap) -> _Sums:
    """Sums over what is far, with the weights of a feature map; row by row."""

    def row(each: tuple[Array, Array, Array, Array, Array | None]) -> _Sums:
        queries, keys, values, allowed, ages = each
        weights = features.scores(queries, keys)
        kept = allowed[None, None] & (weights > 0)
        scores = jnp.where(kept, jnp.log(jnp.where(kept, weights, 1)), _NOTHING)
        if ages is not None:
            scores = jnp.where(kept, scores + jnp.moveaxis(ages, -1, 0)[:, None], _NOTHING)
        sums = _summed(scores, allowed, values)
        return sums._replace(total=sums.total + features.log_scale(queries))

    return jax.lax.map(row, (rows.queries, rows.keys, rows.values, _far(rows), rows.ages))


def _summed(scores: Float[Array, "K R n T"], allowed: Bool[Array, "n T"], values: Float[Array, "T K E"]) -> _Sums:
    """Sums of weights given by their logarithms; means of values, zero where nothing is allowed."""
    total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.maximum(total, _NOTHING / 2)[..., None]), 0)
    return _Sums(jnp.moveaxis(total, -1, 0), weighted_values(weights, values))


def _share(
    near: Float[Array, "B n K R"],
    far: Float[Array, "B n K R"],
    balance: Float[Array, "K R"],
    counted: Bool[Array, "..."],
) -> Float[Array, "B n K R"]:
    """The memory's share of the normaliser."""
    return jnp.where(counted, jax.nn.sigmoid(far + balance - near), 0)


def _mean(share: Float[Array, "B n K R"], counted: Bool[Array, "B n 1 1"]) -> Float[Array, "K R"]:
    return jnp.sum(share, axis=(0, 1)) / jnp.maximum(jnp.sum(counted), 1)


def _balance(
    near: Float[Array, "B n K R"],
    far: Float[Array, "B n K R"],
    target: Float[Array, "K R"],
    counted: Bool[Array, "..."],
) -> Float[Array, "K R"]:
    """The balance at which the memory's mean share is the one wanted, by halving; the share grows with the balance.

    Where no balance within bounds comes to it, or there is nothing to share, it is zero, as before the fit.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        short = _mean(_share(near, far, middle, counted), counted) < target
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    edges = jnp.full(target.shape, -_LARGEST, near.dtype), jnp.full(target.shape, _LARGEST, near.dtype)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, edges)
    found = (low + high) / 2
    return jnp.where((high >= _LARGEST) | (low <= -_LARGEST), 0, found)


def _candidates(mixer: WindowedAttention, rows: _Rows, layout: Layout, key: Array) -> tuple[Any, nnx.State]:
    """Feature maps to try, stacked: the attention's own; or clusters of the teacher's keys, at several temperatures."""
    features = mixer.linear.features
    graph, own = nnx.split(features)
    if not isinstance(features, Clustered):
        return graph, jax.tree.map(lambda leaf: leaf[None], own)
    heads, share = rows.queries.shape[2:4]
    step = -(-rows.keys.shape[0] * rows.keys.shape[1] // KEYS)
    keys = rows.keys.reshape(-1, *rows.keys.shape[2:])[::step] * features.scale**0.5
    there = jnp.ravel(layout.valid)[::step].astype(keys.dtype)
    draws = jax.random.split(key, heads)
    centres = jax.vmap(lambda key, keys: k_means(keys, there, features.size, key), in_axes=(0, 1))(draws, keys)
    maps = [
        nnx.state(features.centred_at(centres, jnp.full((heads, share), each, keys.dtype))) for each in TEMPERATURES
    ]
    return graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)


def k_means(
    points: Float[Array, "N D"], weights: Float[Array, " N"], count: int, key: Key[Array, ""]
) -> Float[Array, "count D"]:
    """Centres of clusters of points, by Lloyd's rounds from points drawn at random.

    Args:
        points: the points.
        weights: of each; those of weight zero do not count.
        count: of clusters; with fewer points than that, some are drawn more than once.
        key: draws the first centres.
    """
    size, chance = points.shape[0], weights / jnp.maximum(jnp.sum(weights), 1e-30)
    first = jax.random.choice(key, size, (count,), replace=size < count, p=chance)

    def lloyd(_: Array, centres: Array) -> Array:
        scores = jnp.einsum("nd,md->nm", points, centres, precision=EXACT)
        nearest = jnp.argmin(jnp.sum(jnp.square(centres), axis=-1) - 2 * scores, axis=-1)
        own = jax.nn.one_hot(nearest, count, dtype=points.dtype) * weights[:, None]
        held = jnp.sum(own, axis=0)[:, None]
        mean = jnp.einsum("nm,nd->md", own, points, precision=EXACT) / jnp.maximum(held, 1)
        # Of a cluster that has lost all of its points the centre stays.
        return jnp.where(held > 0, mean, centres)

    return jax.lax.fori_loop(0, _ROUNDS, lloyd, points[first])


def _with_choice(features: FeatureMap, maps: nnx.State, chosen: Int[Array, "K R"]) -> FeatureMap:
    """The feature map with each query head's choice of tries among maps that differ in queries' part alone."""
    if isinstance(features, Clustered):
        features.query_map = nnx.Param(_chosen(maps["query_map"][...], chosen // len(PARTS)))
    return features


def _chosen(options: Float[Array, "N K R *rest"], chosen: Int[Array, "K R"]) -> Float[Array, "K R *rest"]:
    """Of each query head, the option that it has chosen."""
    index = chosen.reshape(1, *chosen.shape, *(1,) * (options.ndim - 3))
    return jnp.take_along_axis(options, index, axis=0)[0]
