"""TransNormer (Qin et al. 2022): softmax inside groups in the first layers, normalised linear attention behind.

Diagonal layers: `o_t = softmax over s <= t in t's group of q_t·k_s / D^0.5`. Other layers: `o_t = norm(sum_{s<=t}
phi(q_t)·phi(k_s) v_s)` with `phi(x) = elu(x) + 1` and all heads together scaled to a root mean square of one. Every
layer's state is a memory `[K, D, E]` (which diagonal layers leave empty) and the unfinished group, `G K (D + E)`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.composition import ComposedAttention
from lin_jax.attention.layout import Layout
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays


class LayerNumber(nnx.Variable):
    """Number of a layer in its stack, from 0: a float, so that stacked layers stay alike."""


class TransNormerAttention(nnx.Module):
    """One layer's attention, diagonal or normalised by the layer's number.

    Args:
        diagonal: attention inside groups.
        normalised: linear attention with normalised output.
        layer: number of the layer, from 0.
        diagonal_layers: number of diagonal layers, from the first on.
    """

    def __init__(
        self, diagonal: ComposedAttention, normalised: ComposedAttention, *, layer: int | Array, diagonal_layers: int
    ) -> None:
        self.diagonal = diagonal
        self.normalised = normalised
        self.layer = LayerNumber(jnp.asarray(layer, jnp.float32))
        self.diagonal_layers = diagonal_layers

    def init_state(self, batch: int, capacity: int, dtype: Any) -> AugmentedState:
        """The empty state."""
        return self.normalised.init_state(batch, capacity, dtype)

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: AugmentedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, AugmentedState | None]:
        """Outputs for whole rows, and the state after them if one was given."""

        def diagonal() -> tuple[Array, AugmentedState | None]:
            outputs, after = self.diagonal.parallel(qkv, layout, state, bias)
            return outputs, after if state is None or after is None else replace(after, memory=state.memory)

        def normalised() -> tuple[Array, AugmentedState | None]:
            return self.normalised.parallel(qkv, layout, state)

        return jax.lax.cond(self._is_diagonal, diagonal, normalised)

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: AugmentedState,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, Nodes]:
        """Outputs for the nodes of a tree on top of the state."""
        return jax.lax.cond(
            self._is_diagonal,
            lambda: self.diagonal.verify(qkv, tree, state, bias),
            lambda: self.normalised.verify(qkv, tree, state),
        )

    def commit(self, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
        """The state after the first `length` nodes of the path."""
        after = self.normalised.commit(state, path, length)
        memories = (state.memory, after.memory)
        return replace(after, memory=jax.lax.cond(self._is_diagonal, *(lambda m=m: m for m in memories)))

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Array:
        """Outputs for an encoder's rows."""
        return jax.lax.cond(
            self._is_diagonal,
            lambda: self.diagonal.bidirectional(qkv, layout, bias),
            lambda: self.normalised.bidirectional(qkv, layout),
        )

    @property
    def _is_diagonal(self) -> Array:
        return jax.lax.stop_gradient(self.layer[...]) < self.diagonal_layers
