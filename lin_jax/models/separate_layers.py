"""Layers with parameters of their own, for decoding: a loop over stacked parameters copies them at every step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.models.stack import LayerStack, side_by_side


class SeparateLayers(nnx.Module):
    """Layers in the place of a `LayerStack`, run one after the other.

    A loop over stacked parameters copies each layer's before it multiplies with them. Where a step has one token to
    multiply them with, as in decoding, that takes longer than the rest; a program without the loop takes longer to
    compile.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Iterable[nnx.Module]) -> None:
        self.layers = nnx.List(layers)

    @classmethod
    def of(cls, stack: LayerStack) -> "SeparateLayers":
        """The layers of a stack, which is used up: no more than one of its parameters is there twice at a time."""
        graph, state = nnx.split(stack.layers)
        stack.layers = None
        stacked, tree = jax.tree.flatten(state)
        del state
        separate = []
        while stacked:
            leaf = stacked.pop(0)
            separate.append([leaf[at] for at in range(stack.count)])
        return cls(nnx.merge(graph, jax.tree.unflatten(tree, parts)) for parts in zip(*separate, strict=True))

    def together(self) -> LayerStack:
        """The same layers as a stack; its parameters are copies."""
        graph = nnx.split(self.layers[0])[0]
        parameters = self._stacked_parameters()

        def build(rngs: nnx.Rngs, number: Array) -> nnx.Module:
            del rngs
            return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], parameters))

        return LayerStack(build, self.count, rngs=nnx.Rngs(0))

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __call__(self, apply: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
        """Runs `carry, output = apply(layer, carry, input)` over the layers, as a stack does."""
        outputs = []
        for at, layer in enumerate(self.layers):
            carry, output = apply(layer, carry, jax.tree.map(lambda leaf, at=at: leaf[at], inputs))
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def side_by_side(self, apply: Callable[[Any, Any, Any], Any], state: Any, inputs: Any) -> Any:
        """Applies `apply(layer, state, input)` to every layer's state, as in a stack."""
        graph = nnx.split(self.layers[0])[0]
        # Most parameters have nothing to do with states, and are never stacked.
        return side_by_side(graph, self._stacked_parameters(), apply, state, inputs)

    def selected(self, numbers: Sequence[int]) -> "SeparateLayers":
        """Some of the layers, in the given order; they are the same ones, not copies."""
        return SeparateLayers(self.layers[number] for number in numbers)

    def stacked(self, make: Callable[[Any], Any]) -> Any:
        """Results of `make(layer)` for each layer, stacked."""
        return self(lambda layer, carry, _: (carry, make(layer)), None, None)[1]

    def _stacked_parameters(self) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in self.layers))


def as_trained(model: Any) -> Any:
    """The model with its layers in a stack, as checkpoints know it: itself, if it is so."""
    if not isinstance(getattr(model, "layers", None), SeparateLayers):
        return model
    model = nnx.merge(*nnx.split(model))
    model.layers = model.layers.together()
    return model
