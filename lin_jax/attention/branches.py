"""Local, linear and convolution branches, each of them optional, and the combination of their outputs."""

import math
from typing import Any, Literal, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.attention.convolution import Convolution
from lin_jax.attention.linear import LinearBranch
from lin_jax.attention.local import LocalBranch
from lin_jax.attention.pairs import unit
from pallas_kernels.pairs import split_heads, weighted_values
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import QKV

# Fields of the branches, by what they are called in ablations.
_BRANCHES = {"local": "local", "memory": "linear", "convolution": "convolution"}


class Branches(nnx.Module):
    """The parts of a composed attention, over queries and keys of `kv_heads` heads.

    Args:
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys.
        value_dim: size E of values.
        group_size: tokens in a group.
        local: the local branch, or None.
        linear: the linear branch, or None.
        convolution: the convolution, or None.
        initial_alpha: start of the linear branch's learnt factor; None is no factor.
        unit_inputs: scale queries and keys to length one before all else.
        unit_values: scale the values of both branches to length one.
        angular: combine both branches as `unit(v_t / 2 + o_t / pi)` (Castling-ViT, You et al. 2023).
        merged_norm: divide all heads together by `1e-4` plus their length.
        mean: divide what a bidirectional linear branch reads by the number of its tokens: those that are present, or
            all of the row; None leaves the sum.
        implementation: of `pallas_kernels.augmented_attention`, where it computes these branches.
        param_dtype: type of the parameters.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        group_size: int,
        local: LocalBranch | None = None,
        linear: LinearBranch | None = None,
        convolution: Convolution | None = None,
        initial_alpha: float | None = None,
        unit_inputs: bool = False,
        unit_values: bool = False,
        angular: bool = False,
        merged_norm: bool = False,
        mean: Literal["present", "row"] | None = None,
        implementation: str | None = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.group_size = group_size
        self.local = local
        self.linear = linear
        self.convolution = convolution
        self.alpha = None if initial_alpha is None else nnx.Param(jnp.full((1,), initial_alpha, param_dtype))
        self.unit_inputs, self.unit_values = unit_inputs, unit_values
        self.angular, self.merged_norm, self.mean = angular, merged_norm, mean
        self.implementation = implementation

    def ablations(self) -> tuple[str, ...]:
        """Names of the branches that `without` can leave out: those that there are."""
        return tuple(name for name, field in _BRANCHES.items() if getattr(self, field) is not None)

    def without(self, branch: str) -> Self:
        """This attention without one of its branches, over the same parameters; what is left is not trained anew.

        Args:
            branch: local (the pairs inside a group), memory (the linear branch) or convolution.
        """
        rest = nnx.merge(*nnx.split(self))
        setattr(rest, _BRANCHES[branch], None)
        if branch == "memory":
            rest.alpha = None
        return rest

    def scored(self, vectors: Array) -> Array:
        """Queries or keys `[..., D]` as they are scored; a state keeps such keys."""
        return unit(vectors) if self.unit_inputs else vectors

    def fold(self, keys: Array, values: Array, included: Array | None = None) -> Array:
        """The addition of tokens `[B, ..., S]` to the memory `[B, ..., K, M, E]`, by their keys as they are scored."""
        assert self.linear is not None, "there is a linear branch"
        return self.linear.fold(keys, self._values(values), included)

    def _inputs(self, qkv: QKV) -> tuple[Array, Array, Array]:
        """Queries `[B, T, K, R, D]` and keys as they are scored, and values as they came."""
        return split_heads(self.scored(qkv.queries), self.kv_heads), self.scored(qkv.keys), qkv.values

    def _values(self, values: Array) -> Array:
        return unit(values) if self.unit_values else values

    def _pairs(
        self,
        queries: Array,
        keys: Array,
        values: Array,
        local_mask: Array,
        linear_mask: Array | None,
        bias: Array | None,
    ) -> tuple[Array | None, Array | None]:
        """Both branches over explicit pairs: outputs, and sums that are yet to be finished.

        Sums that nothing more is done to share one product with the values with the local branch.
        """
        if self.local is None and self.linear is None:
            return nothing(queries, values), None
        values = self._values(values)
        weights = sums = None
        if self.local is not None:
            weights = self.local.weights(queries, keys, local_mask, bias)
        if self.linear is not None and linear_mask is not None:
            linear = self.linear.weights(queries, keys, linear_mask)
            if self.linear.finish is None:
                weights = plus(weights, self._factored(linear))
            else:
                sums = weighted_values(linear, self.linear.extended(values))
        return (None if weights is None else weighted_values(weights, values)), sums

    def _outputs(self, direct: Array | None, sums: Array | None) -> Float[Array, "*batch T K R E"]:
        if self.linear is None or sums is None:
            assert direct is not None, "there is a branch"
            return direct
        return plus(direct, self._factored(self.linear.finished(sums)))

    def _factored(self, outputs: Array) -> Array:
        return outputs if self.alpha is None else self.alpha[...].astype(outputs.dtype) * outputs

    def _combined(self, outputs: Float[Array, "B T K R E"], values: Float[Array, "B T K E"]) -> Array:
        if self.angular:
            outputs = unit(values[..., None, :].astype(outputs.dtype) / 2 + outputs / math.pi)
        return self._merged(outputs)

    def _merged(self, outputs: Float[Array, "B T K R E"]) -> Array:
        if not self.merged_norm:
            return outputs
        square = jnp.sum(jnp.square(outputs), axis=(-3, -2, -1), keepdims=True)
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        return outputs / (1e-4 + length)


def plus(one: Array | None, other: Array) -> Array:
    """The sum of two parts, of which the first may be missing."""
    return other if one is None else one + other


def nothing(queries: Float[Array, "*batch T K R D"], values: Array) -> Float[Array, "*batch T K R E"]:
    """Outputs where the convolution is all there is."""
    return jnp.zeros((*queries.shape[:-1], values.shape[-1]), accumulation_dtype(values.dtype))
