"""Layers that models share: linear layers, embeddings and norms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.errors import UserError
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.logical_axes import EMBED, VOCABULARY, Axes, read_whole
from pallas_kernels.implementations import target_platform, targets_single_cpu
from pallas_kernels.precision import upcast


def linear(
    config: ComputeConfig,
    size_in: int,
    size_out: int,
    deviation: float,
    rngs: nnx.Rngs,
    *,
    bias: bool = True,
    axes: Axes = (None, None),
) -> nnx.Linear:
    """A linear layer whose weights begin with the given standard deviation.

    Args:
        config: types of numbers.
        size_in: features that it reads.
        size_out: features that it writes.
        deviation: standard deviation of the first weights.
        rngs: random keys.
        bias: whether it has one.
        axes: logical names of both dimensions of the weights.
    """
    layer = nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(deviation),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        dot_general=product_of_tokens,
        rngs=rngs,
    )
    layer.kernel.set_metadata("axes", axes)
    if layer.bias is not None:
        # The residual stream is whole on every device, and so is what is added to it.
        layer.bias.set_metadata("axes", (None if axes[1] == EMBED else axes[1],))
    return layer


def product_of_tokens(x: Array, weight: Array, dimensions: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of vectors `[..., I]` and a matrix, on a CPU with all tokens along one axis.

    There, the gradient of a matrix is a sum over rows and tokens; as one over two axes, XLA for CPUs makes transposed
    copies of both factors for it, and takes twice as long. Along a mesh of several devices, tokens stay in their rows.

    Args:
        x: the vectors.
        weight: the matrix.
        dimensions: as for `dot_general`.
        options: of `dot_general`.
    """
    last = (((x.ndim - 1,), (0,)), ((), ()))
    if x.ndim == 2 or weight.ndim != 2 or dimensions != last or not targets_single_cpu():
        return jax.lax.dot_general(x, weight, dimensions, **options)
    flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), weight, (((1,), (0,)), ((), ())), **options)
    return flat.reshape(*x.shape[:-1], weight.shape[1])


def silu_product(gate: Float[Array, "*batch I"], up: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
    """`silu(gate) * up` (Shazeer 2020), whose gradient on CPUs keeps the two alone."""
    return _silu_product(gate, up) if target_platform() == "cpu" else jax.nn.silu(gate) * up


@jax.custom_vjp
def _silu_product(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _silu_product_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _silu_product(gate, up), (gate, up)


def _silu_product_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    # Each loop computes sigmoids anew, which is quicker than to write and read them; XLA would share what is not
    # behind barriers of its own.
    gate, up = jax.lax.optimization_barrier(kept)
    share = jax.nn.sigmoid(gate)
    again, cotangent_again = jax.lax.optimization_barrier((kept[0], cotangent))
    to_gate = cotangent * up * share * (1 + gate * (1 - share))
    return to_gate, cotangent_again * jax.nn.silu(again)


_silu_product.defvjp(_silu_product_forward, _silu_product_backward)


class Embedding(nnx.Embed):
    """A table of vectors; on a mesh it is gathered, not what is read from it."""

    def __call__(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """The vectors of tokens."""
        table = read_whole(self.embedding[...])
        return jnp.take(table.astype(self.dtype or table.dtype), inputs, axis=0)

    def attend(self, query: Float[Array, "*batch E"], out_sharding: Any = None) -> Float[Array, "*batch V"]:
        """Products of vectors with all vectors of the table: logits of a head that is tied to it."""
        query, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        dimensions = (((query.ndim - 1,), (0,)), ((), ()))
        return product_of_tokens(query, table.T, dimensions, out_sharding=out_sharding)


def embedding(config: ComputeConfig, count: int | None, size: int, deviation: float, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of vectors that begin with the given standard deviation.

    Raises:
        UserError: the count, that of a vocabulary, is not known.
    """
    if count is None:
        raise UserError("model.vocab_size is not set; give it, or a tokenizer to take it from")
    table = Embedding(
        count,
        size,
        embedding_init=nnx.initializers.normal(deviation),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
    table.embedding.set_metadata("axes", (VOCABULARY, EMBED))
    return table


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in float32 or better (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Normalises the last axis."""
        exact = upcast(x)
        scale = self.scale[...].astype(exact.dtype)
        if targets_single_cpu():
            return _scaled_rows(exact, scale, self.eps).astype(x.dtype)
        normed = exact * jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scaled_rows(x: Float[Array, "*batch E"], scale: Float[Array, " E"], eps: float) -> Float[Array, "*batch E"]:
    """Rows over their root mean square, times a scale; the gradient by hand keeps the rows alone, and their factors."""
    return _scaled_rows_forward(x, scale, eps)[0]


def _scaled_rows_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * factor * scale, (x, factor, scale)


def _scaled_rows_backward(eps: float, kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array]:
    del eps
    x, factor, scale = kept
    size = x.shape[-1]
    product = (cotangent * x).reshape(-1, size)
    # Sums as products with vectors: loops over columns are slow.
    to_scale = factor.reshape(-1) @ product
    along = (product @ scale).reshape(factor.shape)
    return factor * (cotangent * scale - x * (along * factor * factor / size)), to_scale


_scaled_rows.defvjp(_scaled_rows_forward, _scaled_rows_backward)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`, in float32 or better (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype))

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Normalises the last axis."""
        exact = upcast(x)
        centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(exact.dtype) + self.bias[...].astype(exact.dtype)).astype(x.dtype)
