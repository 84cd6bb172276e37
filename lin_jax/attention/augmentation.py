"""The augmentation around any causal, bidirectional or cross attention: `local + alpha * base + convolution`.

Attentions that are compositions of branches carry the local branch and the convolution themselves; this is for the
others (softmax, square, linformer, transnormer, yoso). You et al., ICML 2024, augment RFA, Performer and Linformer so.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.composition import ComposedAttention
from lin_jax.attention.layout import Layout
from pallas_kernels.types import QKV, AugmentedState, TreeArrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WrappedState:
    """Decode state of the base, and of the branches around it."""

    base: Any
    around: AugmentedState

    @property
    def position(self) -> Int[Array, "*layers B"]:
        """`[B]` tokens consumed so far."""
        return self.around.position


class WrappedNodes(NamedTuple):
    """A tree's nodes as the base and the branches around it need them."""

    base: Any
    around: Any


class WrappedAttention(nnx.Module):
    """A base attention with a local branch, a convolution, or both around it.

    Args:
        base: the attention.
        around: the local branch and the convolution, each of them optional.
        initial_alpha: start of the base's learnt factor; None is no factor.
        param_dtype: type of the factor.
    """

    def __init__(
        self, base: Any, around: ComposedAttention, *, initial_alpha: float | None, param_dtype: Any = jnp.float32
    ) -> None:
        self.base = base
        self.around = around
        self.alpha = None if initial_alpha is None else nnx.Param(jnp.full((1,), initial_alpha, param_dtype))

    def ablations(self) -> tuple[str, ...]:
        """Names of the branches around the base that `without` can leave out."""
        return self.around.ablations()

    def without(self, branch: str) -> Self:
        """This attention without one of the branches around its base, over the same parameters."""
        rest = nnx.merge(*nnx.split(self))
        rest.around = self.around.without(branch)
        return rest

    def init_state(self, batch: int, capacity: int, dtype: Any) -> WrappedState:
        """Both empty states."""
        return WrappedState(
            self.base.init_state(batch, capacity, dtype), self.around.init_state(batch, capacity, dtype)
        )

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: WrappedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, WrappedState | None]:
        """Outputs of both, added, for whole rows."""
        parts = (None, None) if state is None else (state.base, state.around)
        base, base_state = self.base.parallel(qkv, layout, parts[0], bias)
        around, around_state = self.around.parallel(qkv, layout, parts[1])
        after = None if around_state is None else WrappedState(base_state, around_state)
        return self._sum(base, around), after

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: WrappedState,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, WrappedNodes]:
        """Outputs of both, added, for tree nodes."""
        base, base_nodes = self.base.verify(qkv, tree, state.base, bias)
        around, around_nodes = self.around.verify(qkv, tree, state.around)
        return self._sum(base, around), WrappedNodes(base_nodes, around_nodes)

    def commit(self, state: WrappedState, path: WrappedNodes, length: Int[Array, " B"]) -> WrappedState:
        """Both states after the first `length` nodes of the path."""
        return WrappedState(
            self.base.commit(state.base, path.base, length), self.around.commit(state.around, path.around, length)
        )

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Array:
        """Outputs of both, added, for an encoder's rows."""
        base = self.base.bidirectional(qkv, layout, bias)
        return self._sum(base, self.around.bidirectional(qkv, layout))

    def condense(self, keys: Array, values: Array, layout: Layout) -> WrappedNodes:
        """Both memories of an encoder's output."""
        return WrappedNodes(self.base.condense(keys, values, layout), self.around.condense(keys, values, layout))

    def read(self, queries: Array, positions: Int[Array, "B T"], memory: WrappedNodes) -> Array:
        """Outputs of both, added, for a decoder's queries."""
        base = self.base.read(queries, positions, memory.base)
        return self._sum(base, self.around.read(queries, positions, memory.around))

    def _sum(self, base: Array, around: Array) -> Array:
        return around + (base if self.alpha is None else self.alpha[...].astype(base.dtype) * base)
