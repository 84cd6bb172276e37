"""Identical layers with stacked parameters, run by one scan, so that compile time does not grow with depth."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.models.compute import ComputeConfig
from lin_jax.models.logical_axes import along_mesh

# Programs outside XLA: attention by kernels, by what JAX calls them.
KERNELS = frozenset({"dot_product_attention_fwd_wrapper", "pallas_call", "triton_kernel_call"})


def products(primitive: Any, *arguments: Any, **options: Any) -> Any:
    """Keeps products with weights, and kernels' outputs, so that only cheap work is done again."""
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **options)
    return kept or primitive.name in KERNELS


# The policy for each of `compute.REMAT_KEEPS`.
KEPT: dict[str, Callable[..., Any] | None] = {"nothing": None, "products": products}


class LayerStack(nnx.Module):
    """`count` layers built alike; every parameter has a leading layer axis.

    Args:
        build: makes one layer from random keys and its number.
        count: number of layers.
        compute: how the loop runs: recomputation in the backward pass, and layers per step; None is the defaults.
        rngs: random keys.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs, Array], nnx.Module],
        count: int,
        *,
        compute: ComputeConfig | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.count = count
        compute = compute or ComputeConfig()
        self.remat, self.keep, self.unroll = compute.remat, compute.remat_keeps, compute.unroll
        self.layers = nnx.vmap(build)(rngs.split(count), jnp.arange(count))

    def __call__(self, apply: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
        """Runs `carry, output = apply(layer, carry, input)` over the layers.

        Args:
            apply: one layer's work.
            carry: value passed from layer to layer.
            inputs: a tree whose leaves have a leading layer axis, or None.
        """
        graph, parameters = nnx.split(self.layers)

        def step(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
            carry, output = apply(nnx.merge(graph, layer[0]), carry, layer[1])
            return along_mesh(carry), output

        step = rematerialised(step, self.remat, self.keep)
        return jax.lax.scan(step, along_mesh(carry), (parameters, inputs), length=self.count, unroll=self.unroll)

    def side_by_side(self, apply: Callable[[Any, Any, Any], Any], state: Any, inputs: Any) -> Any:
        """Applies `apply(layer, state, input)` to every layer's state, as the function of this name does."""
        graph, parameters = nnx.split(self.layers)
        return side_by_side(lambda parameters: nnx.merge(graph, parameters), parameters, apply, state, inputs)

    def selected(self, numbers: Sequence[int]) -> "LayerStack":
        """A stack of some of the layers, in the given order; the parameters are copies."""
        index = jnp.asarray(numbers)
        stack = nnx.clone(self)
        nnx.update(stack.layers, jax.tree.map(lambda leaf: leaf[index], nnx.state(self.layers)))
        stack.count = len(numbers)
        return stack

    def stacked(self, make: Callable[[Any], Any]) -> Any:
        """Results of `make(layer)` for each layer, stacked."""
        return self(lambda layer, carry, _: (carry, make(layer)), None, None)[1]


def rematerialised(step: Callable[..., Any], remat: bool, keep: str) -> Callable[..., Any]:
    """One layer's work, recomputed in the backward pass if it is asked for; `keep` is one of `KEPT`."""
    return jax.checkpoint(step, prevent_cse=False, policy=KEPT[keep]) if remat else step


def side_by_side(
    build: Callable[[Any], Any], parameters: Any, apply: Callable[[Any, Any, Any], Any], state: Any, inputs: Any
) -> Any:
    """Applies `apply(layer, state, input)` to every layer's state, all layers at once.

    Positions are the same in all layers, so that whatever depends on them alone is decided once, and a state that is
    written to in a few places stays where it is.

    Args:
        build: makes a layer of its parameters.
        parameters: the layers' parameters, with a leading layer axis.
        apply: one layer's work.
        state: the states, with a leading layer axis.
        inputs: a tree whose leaves have a leading layer axis.
    """
    shared = jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "name", None) == "position", state)
    axes = jax.tree.map(lambda same: None if same else 0, shared)
    each = jax.vmap(
        lambda parameters, state, inputs: apply(build(parameters), state, inputs),
        in_axes=(0, axes, 0),
        out_axes=axes,
    )
    once = each(parameters, jax.tree.map(lambda leaf, same: leaf[0] if same else leaf, state, shared), inputs)
    return jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), once, state)
