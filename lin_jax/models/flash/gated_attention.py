"""The gated attention unit (Hua et al. 2022) over any token mixer: `x + out(gate * attention(q, k, v))`, in one head.

Queries and keys are cheap scaled and shifted copies of one small projection: a pair for the local and one for the
grouped branch of attention by groups, one pair for any other attention.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import QKV, Layout, RelativeBias, TreeArrays, build_mixer
from lin_jax.models.flash.config import FlashConfig
from lin_jax.models.flash.token_shift import after_path, after_rows, shift_nodes, shift_rows
from lin_jax.models.layers import LayerNorm, linear
from lin_jax.models.logical_axes import EMBED, Axes
from pallas_kernels.precision import upcast


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnitState:
    """Decode state of a unit: its mixer's, and the features `[B, F]` that the next token takes from the last one."""

    mixer: Any
    shift: Float[Array, "*layers B F"]

    @property
    def position(self) -> Int[Array, "*layers B"]:
        """`[B]` tokens consumed so far."""
        return self.mixer.position


class UnitNodes(NamedTuple):
    """A tree's nodes as a unit's mixer needs them, and the features `[B, N, F]` that their children take from them."""

    mixer: Any
    shift: Float[Array, "*layers B N F"]


class ScaleNorm(nnx.Module):
    """`x / max(rms(x), eps) * scale`, with a single scale, in float32 or better (Nguyen and Salazar 2019)."""

    def __init__(self, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((1,), param_dtype))

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Normalises the last axis."""
        exact = upcast(x)
        mean = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        normed = exact * jax.lax.rsqrt(jnp.maximum(mean, self.eps**2))
        return (normed * self.scale[...].astype(exact.dtype)).astype(x.dtype)


def rotate_neighbours(
    vectors: Float[Array, "B T M S"], table: tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]
) -> Float[Array, "B T M S"]:
    """Rotates the pairs `(x_{2k}, x_{2k+1})` of the first R features."""
    cos, sin = (part[:, :, None] for part in table)
    size = 2 * cos.shape[-1]
    pairs = vectors[..., :size].astype(cos.dtype).reshape(*vectors.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.reshape(*vectors.shape[:-1], size).astype(vectors.dtype)
    return jnp.concatenate([rotated, vectors[..., size:]], axis=-1)


def flash_linear(config: FlashConfig, size_in: int, size_out: int, axes: Axes, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with a bias."""
    return linear(config, size_in, size_out, config.initializer_range, rngs, axes=axes)


class GatedAttentionUnit(nnx.Module):
    """One layer, in the forms of its token mixer.

    Args:
        config: the model's.
        layer: its number.
        form: causal, or bidirectional in an encoder.
        rngs: random keys.
    """

    def __init__(
        self, config: FlashConfig, layer: Array, form: Literal["causal", "bidirectional"], *, rngs: nnx.Rngs
    ) -> None:
        size, inner, head = config.hidden_size, config.inner_size, config.query_key_size
        param_dtype = jnp.dtype(config.param_dtype)
        branches = 2 if config.two_branches else 1
        self.config = config
        self.form = form
        self.norm: ScaleNorm | LayerNorm = (
            ScaleNorm(config.norm_eps, param_dtype)
            if config.norm == "scale"
            else LayerNorm(size, config.norm_eps, param_dtype)
        )
        # The one head is never cut up, and so nothing of a unit lies along heads.
        self.values_and_gate = flash_linear(config, size, 2 * inner, (EMBED, None), rngs)
        self.shared = flash_linear(config, size, head, (EMBED, None), rngs)
        normal = nnx.initializers.normal
        self.gamma = nnx.Param(normal(0.02)(rngs.params(), (2 * branches, head), param_dtype))
        self.beta = nnx.Param(jnp.zeros((2 * branches, head), param_dtype))
        # Scores are next to nothing at first: it is the bias that lets values through a squared ReLU.
        bias_shape = (config.relative_buckets, 1)
        self.relative_bias = nnx.Param(normal(head**-0.5)(rngs.params(), bias_shape, param_dtype))
        self.mixer = build_mixer(
            config.attention,
            form=form,
            heads=1,
            kv_heads=1,
            head_dim=branches * head,
            value_dim=inner,
            conventions=config.conventions,
            layer=layer,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.out = flash_linear(config, inner, size, (None, EMBED), rngs)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> UnitState:
        """The state before the first token."""
        mixer = self.mixer.init_state(batch, capacity, dtype)
        return UnitState(mixer, jnp.zeros((batch, self.config.shift_size), dtype))

    def parallel(
        self, x: Array, table: tuple[Array, Array], layout: Layout, state: UnitState | None
    ) -> tuple[Array, UnitState | None]:
        """Whole rows `[B, T, E]`; the new state is None if `state` is."""
        given, kept = self._split(x)
        before = None if state is None else state.shift
        qkv, gate = self._project(shift_rows(given, layout, before), kept, table)
        mixer = None if state is None else state.mixer
        mixed, mixer = self.mixer.parallel(qkv, layout, mixer, self._bias)
        after = None if state is None else UnitState(mixer, after_rows(given, layout, state.shift))
        return self._finish(x, mixed, gate), after

    def verify(
        self, x: Array, table: tuple[Array, Array], tree: TreeArrays, state: UnitState
    ) -> tuple[Array, UnitNodes]:
        """Tree nodes `[B, N, E]` on top of a state."""
        given, kept = self._split(x)
        qkv, gate = self._project(shift_nodes(given, tree, state.shift), kept, table)
        mixed, nodes = self.mixer.verify(qkv, tree, state.mixer, self._bias)
        return self._finish(x, mixed, gate), UnitNodes(nodes, given)

    def commit(self, state: UnitState, path: UnitNodes, length: Int[Array, " B"]) -> UnitState:
        """The state after the first `length` nodes of a path, row by row."""
        mixer = self.mixer.commit(state.mixer, path.mixer, length)
        return UnitState(mixer, after_path(path.shift, length, state.shift))

    def bidirectional(self, x: Array, table: tuple[Array, Array], layout: Layout) -> Array:
        """An encoder's rows `[B, T, E]`."""
        given, kept = self._split(x)
        qkv, gate = self._project(shift_rows(given, layout, None), kept, table)
        return self._finish(x, self.mixer.bidirectional(qkv, layout, self._bias), gate)

    @property
    def _bias(self) -> RelativeBias:
        table = self.relative_bias[...] * self.config.query_key_size**0.5
        return RelativeBias(table, self.form == "bidirectional", self.config.relative_max_distance)

    def _split(self, x: Array) -> tuple[Array, Array]:
        """The normed input: features that go to the next token, and features that stay."""
        normed = self.norm(x)
        return normed[..., : self.config.shift_size], normed[..., self.config.shift_size :]

    def _project(self, shifted: Array, kept: Array, table: tuple[Array, Array]) -> tuple[QKV, Array]:
        """Queries and keys `[B, T, 1, D]`, values `[B, T, 1, inner]`, and the gate `[B, T, inner]`."""
        x = jnp.concatenate([shifted, kept], axis=-1)
        values, gate = jnp.split(jax.nn.silu(self.values_and_gate(x)), 2, axis=-1)
        shared = jax.nn.silu(self.shared(x))[:, :, None]
        scaled = shared * self.gamma[...].astype(x.dtype) + self.beta[...].astype(x.dtype)
        queries, keys = jnp.split(rotate_neighbours(scaled, table), 2, axis=2)
        shape = (*x.shape[:2], 1, -1)
        return QKV(queries.reshape(shape), keys.reshape(shape), values.reshape(shape)), gate

    def _finish(self, x: Array, mixed: Float[Array, "B T 1 V"], gate: Float[Array, "B T V"]) -> Array:
        return x + self.out(gate * mixed[:, :, 0])
