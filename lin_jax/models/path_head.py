"""A path head: a small recurrent cell that guesses along a path of a draft tree, knowing the tokens on it.

In the spirit of EAGLE (Li et al. 2024) and Hydra (Ankner et al. 2024), whose drafts go on from what they have guessed;
Medusa's heads guess every depth without knowing what stands at the depths before. As in EAGLE-3 (Li et al. 2025), it
can begin from several layers of the model, and guess the most frequent tokens alone.
"""

from collections.abc import Sequence
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
    length of h says how sure the model is, and a head that begins as the model's own must keep it. Behind h stand the
    outputs of other layers, if the head reads some (`CausalModel.aux_layers`), each divided by its root mean square: P
    fuses them.

    Attributes:
        layers: numbers of the layers that are read beside h.
        tokens: `[N]` tokens that can be guessed, in ascending order; None for all of them.
        projection: P, `[W, D]`, W = `(1 + len(layers)) E`.
        embedding: e, `[V, D]`.
        norm: RMS norm of the state, with scales `[D]`.
        inner: A, `[2 D, F]`, its first D rows for the state and the others for the token.
        bias: b, `[F]`.
        outer: C, `[F, D]`.
        output: O, `[D, N]`.

    Args:
        hidden_size: E.
        width: D.
        vocab_size: V.
        layers: numbers of the layers that are read beside h.
        guessed: how many tokens N can be guessed (which: `limit_to`); None is all of them.
        dtype: type of the parameters.
        rngs: random keys of the cell's weights; what `on` takes from a model is zero without it.

    Raises:
        UserError: the head would be wider than the model.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        vocab_size: int,
        *,
        layers: Sequence[int] = (),
        guessed: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not 1 <= width <= hidden_size:
            raise UserError(f"heads.width {width} does not fit a model of width {hidden_size}; give 1 to {hidden_size}")
        rows_in, rows_out = 2 * width, INNER * width
        self.layers = tuple(layers)
        self.tokens: nnx.Variable[Array] | None = nnx.data(None)
        self.projection = nnx.Param(jnp.zeros((hidden_size * (1 + len(layers)), width), dtype), axes=(EMBED, None))
        self.embedding = nnx.Param(jnp.zeros((vocab_size, width), dtype), axes=(VOCABULARY, None))
        self.norm = RMSNorm(width, 1e-5, dtype)
        self.inner = nnx.Param(nnx.initializers.normal(rows_in**-0.5)(rngs.params(), (rows_in, rows_out), dtype))
        self.bias = nnx.Param(jnp.zeros((rows_out,), dtype))
        small = nnx.initializers.normal(FIRST_UPDATE * rows_out**-0.5)
        self.outer = nnx.Param(small(rngs.params(), (rows_out, width), dtype))
        self.output = nnx.Param(jnp.zeros((width, guessed or vocab_size), dtype), axes=(None, VOCABULARY))

    @classmethod
    def on(
        cls,
        model: CausalModel,
        width: int,
        rngs: nnx.Rngs,
        *,
        layers: Sequence[int] = (),
        tokens: Sequence[int] | None = None,
    ) -> "PathHead":
        """A new head for a model (not one of shapes), which begins by guessing what the model itself would say next.

        Its way from hidden vector to logits is the model's head, `[E, V]`, cut to rank D. Its embeddings are the
        model's own, cut alike, and stretched to mean square one: what a norm makes of the state beside them. Other
        layers than the last have no say yet.

        Raises:
            UserError: the head would be wider than the model.
        """
        dtype = model.embed.embedding[...].dtype
        table = _on_host(model.embed.embedding[...])
        kernel = table.T if model.head is None else _on_host(model.head.kernel[...])
        size, guessed = kernel.shape[0], None if tokens is None else len(tokens)
        head = cls(size, width, kernel.shape[1], layers=layers, guessed=guessed, dtype=dtype, rngs=rngs)
        directions = _left_singular_vectors(kernel, width)
        vectors = table @ _left_singular_vectors(table.T, width)
        if tokens is not None:
            kernel = kernel[:, np.asarray(tokens)]
            head.limit_to(tokens)
        head.projection[...] = jnp.zeros_like(head.projection[...]).at[:size].set(jnp.array(directions, dtype))
        head.output[...] = jnp.array(directions.T @ kernel, dtype)
        head.embedding[...] = jnp.array(vectors / np.sqrt(np.mean(np.square(vectors))), dtype)
        return head

    def limit_to(self, tokens: Sequence[int]) -> None:
        """Says which tokens can be guessed: N of them, in the order of the output's columns."""
        self.tokens = nnx.Variable(jnp.asarray(np.asarray(tokens, np.int32)))

    @property
    def hidden_size(self) -> int:
        """Width E of the model."""
        return self.projection.shape[0] // (1 + len(self.layers))

    @property
    def width(self) -> int:
        """Width D of a state."""
        return self.projection.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens V that it reads."""
        return self.embedding.shape[0]

    @property
    def guessed(self) -> int:
        """Tokens N that it can guess."""
        return self.output.shape[1]

    def begin(self, hidden: Float[Array, "*batch W"]) -> Float[Array, "*batch D"]:
        """The state before the root.

        Raises:
            UserError: the model gives the outputs of other layers than the head reads.
        """
        size, others = self.hidden_size, len(self.layers)
        if hidden.shape[-1] != size * (1 + others):
            raise UserError(
                f"the path head reads layers {list(self.layers)} beside the last of {size} numbers, and was given "
                f"{hidden.shape[-1]} numbers; give the model aux_layers {list(self.layers)}"
            )
        if others:
            aux = hidden[..., size:].reshape(*hidden.shape[:-1], others, size)
            aux = _with_unit_mean_square(aux).reshape(*hidden.shape[:-1], others * size)
            hidden = jnp.concatenate([hidden[..., :size], aux], axis=-1)
        return times(hidden, self.projection)

    def step(self, state: Float[Array, "*batch D"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The state after one more token of the path."""
        bias = self.bias.astype(state.dtype)
        vectors = jnp.take(self.embedding[...], tokens, axis=0).astype(state.dtype)
        heard = jnp.concatenate([self.norm(state), vectors], axis=-1)
        return state + times(jax.nn.silu(times(heard, self.inner) + bias), self.outer)

    def logits(self, state: Float[Array, "*batch D"]) -> Float[Array, "*batch N"]:
        """Logits of the next token of the path, of those that can be guessed, in float32 or better."""
        return upcast(times(state, self.output))

    def over_vocabulary(self, logits: Float[Array, "*batch N"]) -> Float[Array, "*batch V"]:
        """Logits of all tokens; minus infinity for those that are never guessed."""
        if self.tokens is None:
            return logits
        nothing = jnp.full((*logits.shape[:-1], self.vocab_size), -jnp.inf, logits.dtype)
        return nothing.at[..., self.tokens.get_value()].set(logits)

    def named(self, guesses: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Token ids of columns of the output."""
        return guesses if self.tokens is None else jnp.take(self.tokens.get_value(), guesses, axis=0)

    def guess(self, hidden: Float[Array, "*batch W"], path: Int[Array, "*batch K"]) -> Float[Array, "*batch K V"]:
        """Logits of the token after each token of a path that begins with the root."""
        return self.over_vocabulary(self.unrolled(hidden, path))

    def unrolled(self, hidden: Float[Array, "*batch W"], path: Int[Array, "*batch K"]) -> Float[Array, "*batch K N"]:
        """Logits as in `guess`, of the tokens that can be guessed."""

        def step(state: Array, tokens: Array) -> tuple[Array, Array]:
            state = self.step(state, tokens)
            return state, state

        _, states = jax.lax.scan(step, self.begin(hidden), jnp.moveaxis(path, -1, 0))
        return self.logits(jnp.moveaxis(states, 0, -2))


def _with_unit_mean_square(vectors: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """Vectors divided by their root mean square, as of an RMS norm without scales."""
    wide = upcast(vectors)
    size = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-5)).astype(vectors.dtype)


def _on_host(parameter: Array) -> np.ndarray:
    """A parameter on the host, in float32 or better."""
    return np.asarray(upcast(parameter))


def _left_singular_vectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """`[E, D]` orthonormal columns: the `count` strongest directions of the columns of `[E, V]`, strongest first.

    They are eigenvectors of a matrix of E by E, so that a large vocabulary costs one product.
    """
    _, vectors = np.linalg.eigh((matrix @ matrix.T).astype(np.float64))
    return vectors[:, ::-1][:, :count].astype(matrix.dtype)
