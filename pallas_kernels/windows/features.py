"""Positive feature maps that are learnt, for queries `[..., T, K, R, D]` and keys `[..., S, K, D]`.

Hedgehog (Zhang et al. 2024) is `softmax([W x, -W x])`; exponential features (Choromanski et al. 2021) are
`exp(W x' + b - |x'|^2 / 2) / m^0.5` with `x' = x scale^0.5`, queries' divided by the largest, keys' exponents capped.
"""

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pairs import EXACT, fold, pair_scores, recall
from pallas_kernels.precision import accumulation_dtype, upcast

# Keys' exponents are capped here, so that float32 holds sums of products of features.
LARGEST_EXPONENT = 40.0


class Features(Protocol):
    """A feature map's sides."""

    def log_scale(self, queries: Float[Array, "*batch T K R D"]) -> Float[Array, "*batch T K R"]:
        """The logarithm of what `queries` divides features by."""

    def queries(self, queries: Float[Array, "*batch T K R D"]) -> Float[Array, "*batch T K R M"]:
        """Features of queries."""

    def keys(self, keys: Float[Array, "*batch S K D"]) -> Float[Array, "*batch S K M"]:
        """Features of keys."""


def hedgehog_queries(
    queries: Float[Array, "*batch T K R D"], weights: Float[Array, "K R m D"]
) -> Float[Array, "*batch T K R M"]:
    """Hedgehog's features of queries, twice as many as directions."""
    return _both_signs(_projected("...tkrd,krmd->...tkrm", upcast(queries), weights))


def hedgehog_keys(keys: Float[Array, "*batch S K D"], weights: Float[Array, "K m D"]) -> Float[Array, "*batch S K M"]:
    """Hedgehog's features of keys."""
    return _both_signs(_projected("...skd,kmd->...skm", upcast(keys), weights))


def exponential_queries(
    queries: Float[Array, "*batch T K R D"],
    weights: Float[Array, "K R m D"],
    bias: Float[Array, "K R m"] | None,
    scale: float,
) -> tuple[Float[Array, "*batch T K R m"], Float[Array, "*batch T K R"]]:
    """Exponential features of queries, the largest of each one, and the logarithms of what they were divided by."""
    scaled = upcast(queries) * math.sqrt(scale)
    exponents = _projected("...tkrd,krmd->...tkrm", scaled, weights)
    exponents = _with_bias(exponents, bias) - jnp.sum(jnp.square(scaled), axis=-1, keepdims=True) / 2
    largest = jax.lax.stop_gradient(jnp.max(exponents, axis=-1))
    return jnp.exp(exponents - largest[..., None]), largest - math.log(exponents.shape[-1]) / 2


def exponential_keys(
    keys: Float[Array, "*batch S K D"], weights: Float[Array, "K m D"], bias: Float[Array, "K m"] | None, scale: float
) -> Float[Array, "*batch S K m"]:
    """Exponential features of keys."""
    scaled = upcast(keys) * math.sqrt(scale)
    exponents = _with_bias(_projected("...skd,kmd->...skm", scaled, weights), bias)
    exponents = exponents - jnp.sum(jnp.square(scaled), axis=-1, keepdims=True) / 2
    return jnp.exp(jnp.minimum(exponents, LARGEST_EXPONENT)) / math.sqrt(exponents.shape[-1])


class HedgehogMap(NamedTuple):
    """Hedgehog's map: directions of queries `[K, R, m, D]` and keys `[K, m, D]`."""

    query_weights: Float[Array, "K R m D"]
    key_weights: Float[Array, "K m D"]

    def log_scale(self, queries: Array) -> Array:
        """Nothing is divided by."""
        return jnp.zeros(queries.shape[:-1], accumulation_dtype(queries.dtype))

    def queries(self, queries: Array) -> Array:
        """Features of queries."""
        return hedgehog_queries(queries, self.query_weights)

    def keys(self, keys: Array) -> Array:
        """Features of keys."""
        return hedgehog_keys(keys, self.key_weights)


class ExponentialMap(NamedTuple):
    """Exponential features: directions, biases (None for zero), and the factor of q·k that they stand for."""

    query_weights: Float[Array, "K R m D"]
    key_weights: Float[Array, "K m D"]
    query_bias: Float[Array, "K R m"] | None
    key_bias: Float[Array, "K m"] | None
    scale: float

    def log_scale(self, queries: Array) -> Array:
        """The largest exponent of each query, less that of `m^0.5`."""
        return exponential_queries(queries, self.query_weights, self.query_bias, self.scale)[1]

    def queries(self, queries: Array) -> Array:
        """Features of queries."""
        return exponential_queries(queries, self.query_weights, self.query_bias, self.scale)[0]

    def keys(self, keys: Array) -> Array:
        """Features of keys."""
        return exponential_keys(keys, self.key_weights, self.key_bias, self.scale)


def feature_scores(features: Features, queries: Array, keys: Array) -> Float[Array, "*batch K R T S"]:
    """`phi(q)·phi(k)` of every pair."""
    return pair_scores(features.queries(queries), features.keys(keys))


def feature_fold(features: Features, keys: Array, values: Array) -> Float[Array, "*batch K M E"]:
    """The addition of tokens to the memory."""
    return fold(features.keys(keys), values)


def feature_recall(features: Features, queries: Array, memory: Array) -> Float[Array, "*batch T K R E"]:
    """The values that queries read from the memory."""
    return recall(features.queries(queries), memory)


def _projected(products: str, rows: Array, weights: Array) -> Array:
    return jnp.einsum(products, rows, weights.astype(rows.dtype), precision=EXACT)


def _with_bias(exponents: Array, bias: Array | None) -> Array:
    return exponents if bias is None else exponents + bias.astype(exponents.dtype)


def _both_signs(projected: Float[Array, "*batch m"]) -> Float[Array, "*batch M"]:
    return jax.nn.softmax(jnp.concatenate([projected, -projected], axis=-1), axis=-1)
