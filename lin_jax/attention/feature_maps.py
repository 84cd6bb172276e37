"""Feature maps phi: `phi(q)·phi(k)` stands for a function of q·k, so that keys sum up to a memory `sum phi(k) v^T`.

Features of nonlinear maps are taken in float32 or better. Random projections are not learnt; `redraw` makes new ones.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lin_jax.attention.pairs import unit
from pallas_kernels.pairs import EXACT, fold, pair_scores, recall
from pallas_kernels.precision import accumulation_dtype, upcast
from pallas_kernels.windows.features import (
    LARGEST_EXPONENT,
    exponential_keys,
    exponential_queries,
    hedgehog_keys,
    hedgehog_queries,
)

# Matrices that maps learn for each head, by their names. A model with int8 weights has them at bfloat16's precision.
LEARNT_MATRICES = ("query_map", "key_map")


class RandomProjection(nnx.Variable):
    """Directions `[M, D]` drawn at random and kept, not learnt."""

    @classmethod
    def draw(cls, key: Key[Array, ""], count: int, size: int) -> Float[Array, "M D"]:
        """Independent Gaussian directions, float32."""
        return jax.random.normal(key, (count, size), jnp.float32)


class OrthogonalProjection(RandomProjection):
    """Directions orthogonal in blocks of D, which estimate exponentials better (Choromanski et al. 2021)."""

    @classmethod
    def draw(cls, key: Key[Array, ""], count: int, size: int) -> Float[Array, "M D"]:
        """Directions of Gaussian lengths, orthogonal in blocks, float32."""
        directions_key, lengths_key = jax.random.split(key)
        rotations = jax.random.orthogonal(directions_key, size, (-(-count // size),), jnp.float32)
        gaussian = jax.random.normal(lengths_key, (count, size), jnp.float32)
        return rotations.reshape(-1, size)[:count] * jnp.linalg.norm(gaussian, axis=-1, keepdims=True)


class FeatureMap(nnx.Module):
    """`phi`, and the sums that are taken with it; a map of another kind of features overrides the sums."""

    size: int
    """Features M, the rows of a memory."""

    def log_scale(self, queries: Float[Array, "*batch T K R D"]) -> Float[Array, "*batch T K R"]:
        """The logarithm of what `queries` divides features by, so that a normaliser must cancel it; zero if nothing."""
        return jnp.zeros(queries.shape[:-1], accumulation_dtype(queries.dtype))

    def queries(self, queries: Float[Array, "*batch T K R D"]) -> Float[Array, "*batch T K R M"]:
        """Features of queries."""
        raise NotImplementedError

    def keys(self, keys: Float[Array, "*batch S K D"]) -> Float[Array, "*batch S K M"]:
        """Features of keys."""
        raise NotImplementedError

    def scores(
        self, queries: Float[Array, "*batch T K R D"], keys: Float[Array, "*batch S K D"]
    ) -> Float[Array, "*batch K R T S"]:
        """`phi(q)·phi(k)` of every pair."""
        return pair_scores(self.queries(queries), self.keys(keys))

    def fold(
        self,
        keys: Float[Array, "*batch S K D"],
        values: Float[Array, "*batch S K E"],
        included: Bool[Array, "*#batch S"] | None = None,
    ) -> Float[Array, "*batch K M E"]:
        """The addition of tokens to the memory."""
        return fold(self.keys(keys), values, included)

    def recall(
        self, queries: Float[Array, "*batch T K R D"], memory: Float[Array, "*batch K M E"]
    ) -> Float[Array, "*batch T K R E"]:
        """The values that queries read from the memory."""
        return recall(self.queries(queries), memory)


class Identity(FeatureMap):
    """`phi(x) = x`, or the features of x from `start` on."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.size = size
        self.start = start

    def queries(self, queries: Array) -> Array:
        """The queries themselves."""
        return queries[..., self.start :]

    def keys(self, keys: Array) -> Array:
        """The keys themselves."""
        return keys[..., self.start :]


class Relu(FeatureMap):
    """`phi(x) = relu(x)` (Katharopoulos et al. 2020 with this map; Cai et al. 2023)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def queries(self, queries: Array) -> Array:
        """Rectified queries."""
        return jax.nn.relu(upcast(queries))

    def keys(self, keys: Array) -> Array:
        """Rectified keys."""
        return jax.nn.relu(upcast(keys))


class EluPlusOne(FeatureMap):
    """`phi(x) = elu(x) + 1` (Katharopoulos et al. 2020; Qin et al. 2022)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def queries(self, queries: Array) -> Array:
        """Positive queries."""
        return jax.nn.elu(upcast(queries)) + 1

    def keys(self, keys: Array) -> Array:
        """Positive keys."""
        return jax.nn.elu(upcast(keys)) + 1


class PositiveRandomFeatures(FeatureMap):
    """FAVOR+ (Choromanski et al. 2021): `phi(x) = exp(w·x' - |x'|^2 / 2) / M^0.5`, with `x' = x / D^0.25`.

    `phi(q)·phi(k)` estimates `exp(q·k / D^0.5)`. A query's features are scaled by its largest one, which a normaliser
    cancels. The largest possible feature of a key is `exp(|w|^2 / 2)`; exponents are capped at 40, so that float32
    holds sums of products.
    """

    def __init__(self, head_dim: int, size: int, *, rngs: nnx.Rngs) -> None:
        self.size = size
        self.projection = OrthogonalProjection(OrthogonalProjection.draw(rngs.params(), size, head_dim))

    def log_scale(self, queries: Array) -> Array:
        """The largest exponent of each query, less that of `M^0.5`."""
        largest = jax.lax.stop_gradient(jnp.max(self._exponent(queries), axis=-1))
        return largest - math.log(self.size) / 2

    def queries(self, queries: Array) -> Array:
        """Positive features, the largest of each query about one."""
        exponent = self._exponent(queries)
        return jnp.exp(exponent - jax.lax.stop_gradient(jnp.max(exponent, axis=-1, keepdims=True)))

    def keys(self, keys: Array) -> Array:
        """Positive features."""
        return jnp.exp(jnp.minimum(self._exponent(keys), LARGEST_EXPONENT)) / math.sqrt(self.size)

    def _exponent(self, x: Array) -> Array:
        scaled = upcast(x) / x.shape[-1] ** 0.25
        return _project(scaled, self.projection) - jnp.sum(jnp.square(scaled), axis=-1, keepdims=True) / 2


class Hedgehog(FeatureMap):
    """Hedgehog (Zhang et al. 2024): `phi(x) = softmax([W x, -W x])`, with learnt `W` for each head.

    `W` starts as the identity, so that features start as the softmax of queries and keys themselves.

    Args:
        head_dim: size D of queries and keys.
        heads: query heads H.
        kv_heads: key/value heads K.
        param_dtype: type of the parameters.
    """

    def __init__(self, head_dim: int, heads: int, kv_heads: int, *, param_dtype: Any = jnp.float32) -> None:
        self.size = 2 * head_dim
        identity = jnp.eye(head_dim, dtype=param_dtype)
        self.query_map = nnx.Param(jnp.tile(identity, (kv_heads, heads // kv_heads, 1, 1)))
        self.key_map = nnx.Param(jnp.tile(identity, (kv_heads, 1, 1)))

    def queries(self, queries: Array) -> Array:
        """Positive features that sum up to one."""
        return hedgehog_queries(queries, self.query_map[...])

    def keys(self, keys: Array) -> Array:
        """Positive features that sum up to one."""
        return hedgehog_keys(keys, self.key_map[...])


class LearntFeatures(FeatureMap):
    """Features of projections that each head learns: `W x' + b` of keys and `U x' + c` of queries, `x' = x scale^0.5`.

    W and U start as the same random directions, orthogonal in blocks of D, b and c as zeros.

    Args:
        head_dim: size D of queries and keys.
        size: features M.
        heads: query heads H.
        kv_heads: key/value heads K.
        scale: factor of q·k.
        param_dtype: type of the parameters.
        rngs: random keys.
    """

    def __init__(
        self,
        head_dim: int,
        size: int,
        heads: int,
        kv_heads: int,
        *,
        scale: float,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.size, self.scale = size, scale
        share = heads // kv_heads
        draw = partial(OrthogonalProjection.draw, count=size, size=head_dim)
        start = jax.vmap(draw)(jax.random.split(rngs.params(), kv_heads)).astype(param_dtype)
        self.key_map = nnx.Param(start)
        self.key_bias = nnx.Param(jnp.zeros((kv_heads, size), param_dtype))
        self.query_map = nnx.Param(jnp.repeat(start[:, None], share, axis=1))
        self.query_bias = nnx.Param(jnp.zeros((kv_heads, share, size), param_dtype))


class Exponential(LearntFeatures):
    """Learnt positive features: `phi(x) = exp(W x' + b - |x'|^2 / 2) / M^0.5`, with `x' = x scale^0.5`.

    They start as FAVOR+ (Choromanski et al. 2021), each head with projections of its own, so that `phi(q)·phi(k)`
    starts as an estimate of `exp(scale q·k)`; W and b of queries and of keys are learnt apart (as the maps of Zhang et
    al. 2024 are). Queries' features are divided by the largest, keys' exponents are capped, as in
    `PositiveRandomFeatures`.
    """

    def log_scale(self, queries: Array) -> Array:
        """The largest exponent of each query, less that of `M^0.5`."""
        return exponential_queries(queries, self.query_map[...], self.query_bias[...], self.scale)[1]

    def queries(self, queries: Array) -> Array:
        """Positive features, the largest of each query one."""
        return exponential_queries(queries, self.query_map[...], self.query_bias[...], self.scale)[0]

    def keys(self, keys: Array) -> Array:
        """Positive features."""
        return exponential_keys(keys, self.key_map[...], self.key_bias[...], self.scale)


class Clustered(LearntFeatures):
    """Learnt clusters: `phi(k) = softmax(W k' + b)`, `phi(q) = exp(U q' + c)`, with `x' = x scale^0.5`.

    Each of M features stands for a cluster of keys, and says how much a key belongs to it; a query reads a cluster with
    the exponential of its score of the cluster's centre. With centres for W and U, and `b = -|W|^2 / 2`, the belonging
    is that of a mixture of unit Gaussians, and `phi(q)·phi(k)` is softmax's weight of the key's centre in place of the
    key: attention over clusters of keys (Vyas et al. 2020), whose centres are fixed, so that they sum up (as the slots
    of Peng et al. 2022 do). A key counts as one, however long it is. W, b, U and c are learnt for each head; centres
    start at random, and come from a teacher's keys where there is one (`memory_start`). Queries' features are divided
    by the largest, as in `Exponential`.
    """

    def centred_at(self, centres: Float[Array, "K M D"], temperature: Float[Array, "K R"]) -> "Clustered":
        """The same map of clusters around some centres (of `k'`), whose scores queries multiply by a temperature."""
        other = nnx.merge(*nnx.split(self))
        asked = temperature[..., None, None] * centres[:, None]
        values = {
            "key_map": centres,
            "key_bias": -jnp.sum(jnp.square(centres), axis=-1) / 2,
            "query_map": asked,
            "query_bias": jnp.zeros(asked.shape[:-1]),
        }
        for name, value in values.items():
            own = getattr(self, name)[...]
            setattr(other, name, nnx.Param(value.astype(own.dtype)))
        return other

    def log_scale(self, queries: Array) -> Array:
        """The largest exponent of each query."""
        return jax.lax.stop_gradient(jnp.max(self._exponents(queries), axis=-1))

    def queries(self, queries: Array) -> Array:
        """Positive features, the largest of each query one."""
        exponents = self._exponents(queries)
        return jnp.exp(exponents - jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True)))

    def keys(self, keys: Array) -> Array:
        """Positive features that sum up to one."""
        scaled = upcast(keys) * math.sqrt(self.scale)
        scores = jnp.einsum("...skd,kmd->...skm", scaled, self.key_map[...].astype(scaled.dtype), precision=EXACT)
        return jax.nn.softmax(scores + self.key_bias[...].astype(scaled.dtype), axis=-1)

    def _exponents(self, queries: Array) -> Array:
        scaled = upcast(queries) * math.sqrt(self.scale)
        weights = self.query_map[...].astype(scaled.dtype)
        scores = jnp.einsum("...tkrd,krmd->...tkrm", scaled, weights, precision=EXACT)
        return scores + self.query_bias[...].astype(scaled.dtype)


class RandomFourierFeatures(FeatureMap):
    """RFA (Peng et al. 2021): `phi(x) = [sin(w·x), cos(w·x)] (2 / M)^0.5` of unit vectors.

    `phi(q)·phi(k)` estimates `exp(q·k - 1)`.
    """

    def __init__(self, head_dim: int, size: int, *, rngs: nnx.Rngs) -> None:
        self.size = size // 2 * 2
        self.projection = OrthogonalProjection(OrthogonalProjection.draw(rngs.params(), size // 2, head_dim))

    def queries(self, queries: Array) -> Array:
        """Sines and cosines."""
        angles = _project(unit(upcast(queries)), self.projection)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1) * math.sqrt(2 / self.size)

    def keys(self, keys: Array) -> Array:
        """Sines and cosines."""
        return self.queries(keys)


class HashCollisions(FeatureMap):
    """YOSO's hash tables (Zeng et al. 2021): `phi(x)` marks, in each of m tables of `2^bits` rows, the row of x's hash.

    A hash is the signs of x in `bits` random directions. `phi(q)·phi(k)` is the share of tables in which q and k
    collide, `(1 - arccos(q·k) / pi)^bits` in expectation over unit vectors. The memory is the tables.
    """

    def __init__(self, head_dim: int, hashes: int, bits: int, *, rngs: nnx.Rngs) -> None:
        self.hashes, self.bits = hashes, bits
        self.size = hashes * 2**bits
        self.projection = RandomProjection(RandomProjection.draw(rngs.params(), hashes * bits, head_dim))

    def scores(self, queries: Array, keys: Array) -> Array:
        """The share of tables in which each pair collides."""
        own, other = jnp.moveaxis(self.rows(queries), -4, -2), jnp.moveaxis(self.rows(keys), -3, -2)
        collide = own[..., :, None, :] == other[..., None, None, :, :]
        return jnp.mean(collide, axis=-1, dtype=accumulation_dtype(queries.dtype))

    def fold(self, keys: Array, values: Array, included: Bool[Array, "*#batch S"] | None = None) -> Array:
        """The addition of tokens to the tables: their values, in their rows."""
        marks = jax.nn.one_hot(self.rows(keys), 2**self.bits, dtype=accumulation_dtype(keys.dtype))
        return fold(marks.reshape(*marks.shape[:-2], self.size), values, included)

    def recall(self, queries: Array, memory: Array) -> Array:
        """The mean of the tables' rows that queries hash to."""
        tables = memory.reshape(*memory.shape[:-2], self.hashes, 2**self.bits, memory.shape[-1])
        rows = jnp.moveaxis(self.rows(queries), -4, -2)  # [..., K, R, T, m]
        lead = rows.shape[:-3]
        rows = jnp.moveaxis(rows.reshape(*lead, -1, self.hashes), -1, -2)[..., None]  # [..., K, m, R T, 1]
        found = jnp.mean(jnp.take_along_axis(tables, rows, axis=-2), axis=-3)
        return jnp.moveaxis(found.reshape(*lead, queries.shape[-2], -1, found.shape[-1]), -2, -4)

    def rows(self, x: Float[Array, "*batch D"]) -> Int[Array, "*batch m"]:
        """The row that each of the m hashes of a vector names."""
        signs = _project(upcast(x), self.projection) > 0
        powers = 2 ** jnp.arange(self.bits)
        return jnp.sum(signs.reshape(*x.shape[:-1], self.hashes, self.bits) * powers, axis=-1)


def redraw(module: nnx.Module, key: Key[Array, ""]) -> None:
    """Draws every random projection of a module anew, in place."""
    for number, (_, projection) in enumerate(nnx.to_flat_state(nnx.state(module, RandomProjection))):
        *stack, count, size = projection[...].shape
        keys = jax.random.split(jax.random.fold_in(key, number), math.prod(stack))
        drawn = jax.vmap(partial(projection.type.draw, count=count, size=size))(keys)
        projection[...] = drawn.reshape(projection[...].shape)


def _project(x: Float[Array, "*batch D"], projection: Any) -> Float[Array, "*batch M"]:
    directions = jax.lax.stop_gradient(projection[...]).astype(x.dtype)
    return jnp.einsum("...d,md->...m", x, directions, precision=EXACT)
