"""Decay of a memory: the factor that what is in it is multiplied by at each token, per key/value head.

The weight of token s for a query at t has the factor `prod_{s<r<=t} a_r`. Factors are kept as logarithms, of which only
sums over stretches of text are exponentiated; they are never positive, so that no exponential overflows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.precision import upcast


class ConstantDecay(nnx.Module):
    """A factor for each head, `log a = -exp(rate)` (retention, Sun et al. 2023), learnt.

    Heads start with half-lives from 16 to 2,048 tokens, spread evenly on a logarithmic scale.

    Args:
        kv_heads: key/value heads K.
        param_dtype: type of the rates.
    """

    def __init__(self, kv_heads: int, *, param_dtype: Any = jnp.float32) -> None:
        half_lives = jnp.geomspace(16, 2048, kv_heads) if kv_heads > 1 else jnp.full((1,), 256.0)
        self.rate = nnx.Param(jnp.log(jnp.log(2.0) / half_lives).astype(param_dtype))

    def logarithms(self, values: Float[Array, "*batch T K E"]) -> Float[Array, "*batch T K"]:
        """`log a` of every token."""
        return jnp.broadcast_to(-jnp.exp(upcast(self.rate[...])), values.shape[:-1])


class TokenDecay(nnx.Module):
    """A factor that each token chooses, `log a = log(sigmoid(w·v + b)) / 16` (GLA, Yang et al. 2024, one per head).

    The token speaks through its value vector, a projection of its hidden vector that no rotary position turns; no
    projection is added (Liger, Lan et al. 2025, takes the key's). `w` starts at zero, `b` where half-lives are about
    256 tokens.

    Args:
        kv_heads: key/value heads K.
        value_dim: size E of values.
        param_dtype: type of the parameters.
    """

    def __init__(self, kv_heads: int, value_dim: int, *, param_dtype: Any = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.zeros((kv_heads, value_dim), param_dtype))
        self.bias = nnx.Param(jnp.full((kv_heads,), 3.1, param_dtype))

    def logarithms(self, values: Float[Array, "*batch T K E"]) -> Float[Array, "*batch T K"]:
        """`log a` of every token."""
        wide = upcast(values)
        gates = jnp.einsum("...tke,ke->...tk", wide, self.weight[...].astype(wide.dtype), precision="highest")
        return jax.nn.log_sigmoid(gates + self.bias[...].astype(wide.dtype)) / 16


Decay = ConstantDecay | TokenDecay
