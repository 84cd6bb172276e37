"""A path head: a small recurrent cell that guesses along a path of a draft tree, knowing the tokens on it.

In the spirit of EAGLE (Li et al. 2024) and Hydra (Ankner et al. 2024), whose drafts go on from what they have guessed;
Medusa's heads guess every depth without knowing what stands at the depths before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.errors import UserError
from lin_jax.models.causal import CausalModel
from lin_jax.models.layers import RMSNorm
from lin_jax.models.logical_axes import EMBED, VOCABULARY
from lin_jax.models.products import times
from pallas_kernels.precision import upcast

# Width of the cell's inner layer, as a multiple of D.
INNER = 2
# How small the cell's first updates are: standard deviation of its outer weights, times the square root of their rows.
FIRST_UPDATE = 0.1


class PathHead(nnx.Module):
    """One cell for all depths, of a width D below the model's E, so that a guess costs little.

        begin(h)       s = h P
        step(s, x)     s + silu([norm(s); e(x)] A + b) C
        logits(s)      s O

    h is the vector from which the root of the tree was chosen: `step(begin(h), root)` is the state whose logits guess
    the token after the root, a step with that guess leads to the next, and so on. There is no norm before O: the
    length of h says how sure the model is, and a head that begins as the model's own must keep it.

    Attributes:
        projection: P, `[E, D]`.
        embedding: e, `[V, D]`.
        norm: RMS norm of the state, with scales `[D]`.
        inner: A, `[2 D, F]`, its first D rows for the state and the others for the token.
        bias: b, `[F]`.
        outer: C, `[F, D]`.
        output: O, `[D, V]`.

    Args:
        hidden_size: E.
        width: D.
        vocab_size: V.
        dtype: type of the parameters.
        rngs: random keys of the cell's weights; what `on` takes from a model is zero without it.

    Raises:
        UserError: the head would be wider than the model.
    """

    def __init__(
        self, hidden_size: int, width: int, vocab_size: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        if not 1 <= width <= hidden_size:
            raise UserError(f"heads.width {width} does not fit a model of width {hidden_size}; give 1 to {hidden_size}")
        rows_in, rows_out = 2 * width, INNER * width
        self.projection = nnx.Param(jnp.zeros((hidden_size, width), dtype), axes=(EMBED, None))
        self.embedding = nnx.Param(jnp.zeros((vocab_size, width), dtype), axes=(VOCABULARY, None))
        self.norm = RMSNorm(width, 1e-5, dtype)
        self.inner = nnx.Param(nnx.initializers.normal(rows_in**-0.5)(rngs.params(), (rows_in, rows_out), dtype))
        self.bias = nnx.Param(jnp.zeros((rows_out,), dtype))
        small = nnx.initializers.normal(FIRST_UPDATE * rows_out**-0.5)
        self.outer = nnx.Param(small(rngs.params(), (rows_out, width), dtype))
        self.output = nnx.Param(jnp.zeros((width, vocab_size), dtype), axes=(None, VOCABULARY))

    @classmethod
    def on(cls, model: CausalModel, width: int, rngs: nnx.Rngs) -> "PathHead":
        """A new head for a model (not one of shapes), which begins by guessing what the model itself would say next.

        Its way from hidden vector to logits is the model's head, `[E, V]`, cut to rank D. Its embeddings are the
        model's own, cut alike, and stretched to mean square one: what a norm makes of the state beside them.

        Raises:
            UserError: the head would be wider than the model.
        """
        dtype = model.embed.embedding[...].dtype
        table = _on_host(model.embed.embedding[...])
        kernel = table.T if model.head is None else _on_host(model.head.kernel[...])
        head = cls(kernel.shape[0], width, kernel.shape[1], dtype=dtype, rngs=rngs)
        directions = _left_singular_vectors(kernel, width)
        vectors = table @ _left_singular_vectors(table.T, width)
        head.projection[...] = jnp.array(directions, dtype)
        head.output[...] = jnp.array(directions.T @ kernel, dtype)
        head.embedding[...] = jnp.array(vectors / np.sqrt(np.mean(np.square(vectors))), dtype)
        return head

    @property
    def hidden_size(self) -> int:
        """Width E of the model."""
        return self.projection.shape[0]

    @property
    def width(self) -> int:
        """Width D of a state."""
        return self.projection.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens V."""
        return self.output.shape[1]

    def begin(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch D"]:
        """The state before the root."""
        return times(hidden, self.projection)

    def step(self, state: Float[Array, "*batch D"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The state after one more token of the path."""
        bias = self.bias.astype(state.dtype)
        vectors = jnp.take(self.embedding[...], tokens, axis=0).astype(state.dtype)
        heard = jnp.concatenate([self.norm(state), vectors], axis=-1)
        return state + times(jax.nn.silu(times(heard, self.inner) + bias), self.outer)

    def logits(self, state: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of the next token of the path, in float32 or better."""
        return upcast(times(state, self.output))

    def guess(self, hidden: Float[Array, "*batch E"], path: Int[Array, "*batch K"]) -> Float[Array, "*batch K V"]:
        """Logits of the token after each token of a path that begins with the root."""

        def step(state: Array, tokens: Array) -> tuple[Array, Array]:
            state = self.step(state, tokens)
            return state, state

        _, states = jax.lax.scan(step, self.begin(hidden), jnp.moveaxis(path, -1, 0))
        return self.logits(jnp.moveaxis(states, 0, -2))


def _on_host(parameter: Array) -> np.ndarray:
    """A parameter on the host, in float32 or better."""
    return np.asarray(upcast(parameter))


def _left_singular_vectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """`[E, D]` orthonormal columns: the `count` strongest directions of the columns of `[E, V]`, strongest first.

    They are eigenvectors of a matrix of E by E, so that a large vocabulary costs one product.
    """
    _, vectors = np.linalg.eigh((matrix @ matrix.T).astype(np.float64))
    return vectors[:, ::-1][:, :count].astype(matrix.dtype)
