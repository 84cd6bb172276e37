"""Medusa heads (Cai et al. 2024): extra heads that guess the tokens after the next one from the same hidden vector."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.models.causal import CausalModel
from lin_jax.models.logical_axes import EMBED, VOCABULARY
from lin_jax.models.products import times
from pallas_kernels.precision import upcast


class MedusaHeads(nnx.Module):
    """Head m (from 0) gives `W1 (h + silu(W0 h + b0))`, logits of the token `m + 2` after the position of h.

    `W0` and `b0` start at zero and `W1` as the language-model head, so that every head starts as a copy of it
    (but for its bias, where it has one: FLASH).

    Attributes:
        weight: `[M, E, E]` of the residual blocks.
        bias: `[M, E]`.
        output: `[M, E, V]`.
    """

    def __init__(self, heads: int, hidden_size: int, vocab_size: int, *, dtype: Any = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.zeros((heads, hidden_size, hidden_size), dtype), axes=(None, EMBED, None))
        self.bias = nnx.Param(jnp.zeros((heads, hidden_size), dtype))
        self.output = nnx.Param(jnp.zeros((heads, hidden_size, vocab_size), dtype), axes=(None, EMBED, VOCABULARY))

    @classmethod
    def on(cls, model: CausalModel, heads: int) -> "MedusaHeads":
        """New heads for a model, started from its language-model head."""
        kernel = model.embed.embedding[...].T if model.head is None else model.head.kernel[...]
        medusa = cls(heads, *kernel.shape, dtype=kernel.dtype)
        medusa.output[...] = jnp.broadcast_to(kernel, (heads, *kernel.shape))
        return medusa

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.bias.shape[0]

    @property
    def vocab_size(self) -> int:
        """Tokens V."""
        output = self.output[0] if isinstance(self.output, nnx.List) else self.output
        return output.shape[-1]

    def __call__(self, hidden: Float[Array, "*batch E"], which: slice = slice(None)) -> Float[Array, "*batch M V"]:
        """Logits of all heads, or of those in a slice, in float32 or better."""
        if isinstance(self.output, nnx.List):
            return self._one_by_one(hidden, which)
        weight, bias, output = (part[which].astype(hidden.dtype) for part in (self.weight, self.bias, self.output))
        block = jax.nn.silu(jnp.einsum("...e,mef->...mf", hidden, weight) + bias)
        logits = jnp.einsum("...me,mev->...mv", hidden[..., None, :] + block, output)
        return upcast(logits)

    def _one_by_one(self, hidden: Float[Array, "*batch E"], which: slice) -> Float[Array, "*batch M V"]:
        """Logits with matrices that are stored for decoding, a head at a time."""
        found = []
        for head in range(self.count)[which]:
            block = jax.nn.silu(times(hidden, self.weight[head]) + self.bias[head].astype(hidden.dtype))
            found.append(times(hidden + block, self.output[head]))
        return upcast(jnp.stack(found, axis=-2))

    def guess(self, hidden: Float[Array, "*batch E"], path: Int[Array, "*batch M"]) -> Float[Array, "*batch M V"]:
        """Logits of the token after each token of a path; the heads do not look at the tokens themselves."""
        return self(hidden, slice(path.shape[-1]))
