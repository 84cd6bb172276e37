"""Layers that differ in their token mixers alone: all else is stacked over all layers, mixers kind by kind."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lin_jax.attention import AttentionConfig
from lin_jax.models.by_kind import ByKind, Step, layers_of_kinds, numbered, over_layers
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.logical_axes import along_mesh
from lin_jax.models.prenorm_block import PreNormBlock
from lin_jax.models.stack import LayerStack, rematerialised, side_by_side

# Names of each kind's mixers, before its number.
KIND = "kind"


class KindMixers(nnx.Module):
    """Stacked token mixers of each kind, as `kind0`, `kind1` and so on.

    Args:
        mixers: those of each kind.
    """

    def __init__(self, mixers: Sequence[nnx.Module]) -> None:
        for kind, mixer in enumerate(mixers):
            setattr(self, f"{KIND}{kind}", mixer)

    def each(self, count: int) -> list[nnx.Module]:
        """The mixers of the first `count` kinds."""
        return [getattr(self, f"{KIND}{kind}") for kind in range(count)]


class MixedStack(LayerStack):
    """Layers with token mixers of several kinds; states are `ByKind`.

    Parameters beside the mixers have a leading axis of all layers, under the same names as in a stack of equal layers;
    those of mixers, one of each kind's layers.

    Args:
        layers: all layers, stacked, without their mixers.
        mixers: the mixers of each kind, stacked.
        order: kind of each layer, numbered as they first occur.
        compute: how the loop runs, as in `LayerStack`.
    """

    def __init__(
        self,
        layers: PreNormBlock,
        mixers: Sequence[nnx.Module],
        order: tuple[int, ...],
        *,
        compute: ComputeConfig | None = None,
    ) -> None:
        compute = compute or ComputeConfig()
        self.count, self.order = len(order), order
        self.remat, self.keep, self.unroll = compute.remat, compute.remat_keeps, compute.unroll
        self.layers = layers
        self.mixer = KindMixers(mixers)

    @classmethod
    def build(
        cls,
        build: Callable[[AttentionConfig, nnx.Rngs, Array], PreNormBlock],
        attentions: Sequence[AttentionConfig],
        *,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> "MixedStack":
        """Layers with an attention each; `build` makes one of them, from its attention, random keys and number."""
        order, kinds, count = numbered(attentions), list(dict.fromkeys(attentions)), len(attentions)
        layers = nnx.vmap(lambda rngs, number: without_mixer(build(kinds[0], rngs, number)))(
            rngs.split(count), jnp.arange(count)
        )

        def stacked_mixers(kind: AttentionConfig, numbers: list[int]) -> nnx.Module:
            make = nnx.vmap(lambda rngs, number: build(kind, rngs, number).attention.mixer)
            return make(rngs.split(len(numbers)), jnp.asarray(numbers))

        mixers = [stacked_mixers(*each) for each in zip(kinds, layers_of_kinds(order), strict=True)]
        return cls(layers, mixers, order, compute=compute)

    @property
    def mixers(self) -> list[nnx.Module]:
        """The mixers of each kind, stacked."""
        return self.mixer.each(max(self.order) + 1)

    def __call__(self, apply: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
        """Runs `carry, output = apply(layer, carry, input)` over the layers; outputs are `ByKind`.

        Args:
            apply: one layer's work.
            carry: value passed from layer to layer.
            inputs: states by kind; or a tree whose leaves have a leading layer axis, or None.
        """
        block, parameters = stack_parts(self)
        given = inputs if isinstance(inputs, ByKind) else ByKind((inputs,), (0,) * self.count)

        def step(kinds: tuple[int, ...], carry: Any, values: tuple[Any, ...]) -> tuple[Any, Any]:
            return apply(block(kinds[1], values[0], values[1]), carry, values[2])

        return _run(self, step, carry, (*parameters, given))

    def side_by_side(self, apply: Callable[[Any, Any, Any], Any], state: ByKind, inputs: ByKind) -> ByKind:
        """Applies `apply(layer, state, input)` to every layer's state, those of one kind at once."""
        block, (shared, mixers) = stack_parts(self)
        done = []
        for kind, numbers in enumerate(layers_of_kinds(self.order)):
            index = jnp.asarray(numbers)
            own = jax.tree.map(lambda leaf, index=index: leaf[index], shared.kinds[0]), mixers.kinds[kind]
            build = lambda parameters, kind=kind: block(kind, *parameters)  # noqa: E731
            done.append(side_by_side(build, own, apply, state.kinds[kind], inputs.kinds[kind]))
        return ByKind(tuple(done), self.order)

    def selected(self, numbers: Sequence[int]) -> "MixedStack":
        """A stack of some of the layers, in the given order; the parameters are copies."""
        kinds = [self.order[number] for number in numbers]
        index = jnp.asarray(numbers)
        mixers = []
        for kind in dict.fromkeys(kinds):
            own = jnp.asarray([self.order[:number].count(kind) for number in numbers if self.order[number] == kind])
            mixers.append(_taken(self.mixers[kind], own))
        stack = MixedStack(_taken(self.layers, index), mixers, numbered(kinds))
        stack.remat, stack.keep, stack.unroll = self.remat, self.keep, self.unroll
        return stack


def stack_parts(stack: LayerStack) -> tuple[Callable[..., PreNormBlock], tuple[ByKind, ByKind]]:
    """A function that makes a layer of its kind and parameters, and the parameters of all layers: shared, and mixers'.

    A stack of equal layers is one kind, whose mixers are among what is shared.
    """
    graph, shared = nnx.split(stack.layers)
    mixers = [nnx.split(each) for each in stack.mixers] if isinstance(stack, MixedStack) else []
    alike = (0,) * stack.count

    def block(kind: int, shared: Any, own: Any) -> PreNormBlock:
        layer = nnx.merge(graph, shared)
        if mixers:
            layer.attention.mixer = nnx.merge(mixers[kind][0], own)
        return layer

    if not isinstance(stack, MixedStack):
        return block, (ByKind((shared,), alike), ByKind((None,), alike))
    return block, (ByKind((shared,), alike), ByKind(tuple(each[1] for each in mixers), stack.order))


def pairwise(
    own: LayerStack,
    theirs: LayerStack,
    apply: Callable[[PreNormBlock, PreNormBlock, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
) -> tuple[Any, Any]:
    """Runs `carry, output = apply(own layer, their layer, carry, input)` over two stacks of as many layers.

    Args:
        own: one stack.
        theirs: the other, which also says how the loop runs.
        apply: the work of a pair of layers.
        carry: value passed from layer to layer.
        inputs: a tree whose leaves have a leading layer axis, or None.

    Returns:
        What is passed on by the last layer, and the outputs, with a leading layer axis.
    """
    own_block, own_parameters = stack_parts(own)
    their_block, their_parameters = stack_parts(theirs)

    def step(kinds: tuple[int, ...], carry: Any, values: tuple[Any, ...]) -> tuple[Any, Any]:
        return apply(own_block(kinds[1], *values[:2]), their_block(kinds[3], *values[2:4]), carry, values[4])

    given = ByKind((inputs,), (0,) * own.count)
    carry, outputs = _run(theirs, step, carry, (*own_parameters, *their_parameters, given))
    return carry, outputs.in_order()


def _run(stack: LayerStack, step: Step, carry: Any, values: Sequence[ByKind]) -> tuple[Any, ByKind]:
    """Runs one layer's work over the layers, along a mesh, and recomputed and unrolled as a stack is."""

    def along(kinds: tuple[int, ...], carry: Any, values: tuple[Any, ...]) -> tuple[Any, Any]:
        work = rematerialised(lambda carry, values: step(kinds, carry, values), stack.remat, stack.keep)
        carry, output = work(carry, values)
        return along_mesh(carry), output

    return over_layers(along, along_mesh(carry), values, unroll=stack.unroll)


def without_mixer(block: PreNormBlock) -> PreNormBlock:
    """A layer whose token mixer is left out."""
    block.attention.mixer = None
    return block


def layer_stack(config: Any, build: Callable[[Any, nnx.Rngs, Array], PreNormBlock], rngs: nnx.Rngs) -> LayerStack:
    """The layers of a causal model: one stack where all have one attention, else a mixed one.

    Args:
        config: the model's, with `attention`, `num_layers` and `compute`.
        build: makes a layer from a configuration with one attention, random keys and its number.
        rngs: random keys.

    Raises:
        UserError: the attentions do not fit the number of layers.
    """
    every = config.attention.of_layers(config.num_layers)
    if len(set(every)) < 2:
        alike = replace(config, attention=config.attention.for_layers(config.num_layers))
        return LayerStack(
            lambda rngs, layer: build(alike, rngs, layer), config.num_layers, compute=config.compute, rngs=rngs
        )
    return MixedStack.build(
        lambda attention, rngs, layer: build(replace(config, attention=attention), rngs, layer),
        every,
        compute=config.compute,
        rngs=rngs,
    )


def _taken(stack: Any, index: Array) -> Any:
    """Some of stacked modules; the parameters are copies."""
    graph, parameters = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], parameters))
