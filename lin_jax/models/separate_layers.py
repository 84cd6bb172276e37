"""Layers with parameters of their own, for decoding: a loop over stacked parameters copies them at every step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.models.by_kind import ByKind, layers_of_kinds, numbered
from lin_jax.models.mixed_stack import MixedStack, stack_parts, without_mixer
from lin_jax.models.stack import LayerStack, side_by_side


class SeparateLayers(nnx.Module):
    """Layers in the place of a `LayerStack`, run one after the other.

    A loop over stacked parameters copies each layer's before it multiplies with them. Where a step has one token to
    multiply them with, as in decoding, that takes longer than the rest; a program without the loop takes longer to
    compile.

    Args:
        layers: the layers.
        order: kind of each layer, where their mixers are of several; None where they are of one.
    """

    def __init__(self, layers: Iterable[nnx.Module], order: tuple[int, ...] | None = None) -> None:
        self.layers = nnx.List(layers)
        self.order = order

    @classmethod
    def of(cls, stack: LayerStack) -> "SeparateLayers":
        """The layers of a stack, which is used up: no more than one of its parameters is there twice at a time."""
        block, (shared, mixers) = stack_parts(stack)
        order, mixed = mixers.order, isinstance(stack, MixedStack)
        stack.layers = None
        # Mixers are small beside the rest.
        own = [mixers.of_layer(number) for number in range(stack.count)]
        stacked, tree = jax.tree.flatten(shared.kinds[0])
        del shared
        separate = []
        while stacked:
            leaf = stacked.pop(0)
            separate.append([leaf[at] for at in range(stack.count)])
        parts = (jax.tree.unflatten(tree, leaves) for leaves in zip(*separate, strict=True))
        layers = [block(kind, *each) for kind, *each in zip(order, parts, own, strict=True)]
        return cls(layers, order if mixed else None)

    def together(self) -> LayerStack:
        """The same layers as a stack; its parameters are copies."""
        if self.order is not None:
            return self._mixed()
        graph = nnx.split(self.layers[0])[0]
        parameters = _stacked_parameters(self.layers)

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
            given = (
                inputs.of_layer(at)
                if isinstance(inputs, ByKind)
                else jax.tree.map(lambda leaf, at=at: leaf[at], inputs)
            )
            carry, output = apply(layer, carry, given)
            outputs.append(output)
        if self.order is not None:
            return carry, ByKind.of(outputs, self.order)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def side_by_side(self, apply: Callable[[Any, Any, Any], Any], state: Any, inputs: Any) -> Any:
        """Applies `apply(layer, state, input)` to every layer's state, as in a stack."""
        if self.order is None:
            return self._kind_side_by_side(self.layers, apply, state, inputs)
        done = [
            self._kind_side_by_side([self.layers[number] for number in numbers], apply, *kind)
            for numbers, *kind in zip(layers_of_kinds(self.order), state.kinds, inputs.kinds, strict=True)
        ]
        return ByKind(tuple(done), self.order)

    def selected(self, numbers: Sequence[int]) -> "SeparateLayers":
        """Some of the layers, in the given order; they are the same ones, not copies."""
        order = None if self.order is None else numbered([self.order[number] for number in numbers])
        return SeparateLayers([self.layers[number] for number in numbers], order)

    def stacked(self, make: Callable[[Any], Any]) -> Any:
        """Results of `make(layer)` for each layer, stacked."""
        return self(lambda layer, carry, _: (carry, make(layer)), None, None)[1]

    @staticmethod
    def _kind_side_by_side(
        layers: Sequence[Any], apply: Callable[[Any, Any, Any], Any], state: Any, inputs: Any
    ) -> Any:
        graph = nnx.split(layers[0])[0]
        # Most parameters have nothing to do with states, and are never stacked.
        return side_by_side(
            lambda parameters: nnx.merge(graph, parameters), _stacked_parameters(layers), apply, state, inputs
        )

    def _mixed(self) -> MixedStack:
        assert self.order is not None, "checked by the caller"
        blocks = [nnx.merge(*nnx.split(layer)) for layer in self.layers]
        mixers = [
            _stacked([blocks[number].attention.mixer for number in numbers]) for numbers in layers_of_kinds(self.order)
        ]
        return MixedStack(_stacked([without_mixer(block) for block in blocks]), mixers, self.order)


def _stacked(layers: Sequence[Any]) -> Any:
    """Modules that are alike as one, whose parameters have a leading axis."""
    return nnx.merge(nnx.split(layers[0])[0], _stacked_parameters(layers))


def _stacked_parameters(layers: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers))


def as_trained(model: Any) -> Any:
    """The model with its layers in a stack, as checkpoints know it: itself, if it is so."""
    if not isinstance(getattr(model, "layers", None), SeparateLayers):
        return model
    model = nnx.merge(*nnx.split(model))
    model.layers = model.layers.together()
    return model
