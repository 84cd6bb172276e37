"""Values of layers of several kinds, stacked kind by kind, and a loop over the layers that stays a scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByKind:
    """A value for each layer: those of one kind are stacked, whose trees may differ from another kind's.

    Attributes:
        kinds: the values of each kind; leaves have a leading axis of its layers, in their order.
        order: kind of each layer, numbered as they first occur.
    """

    kinds: tuple[Any, ...]
    order: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, values: Sequence[Any], order: tuple[int, ...]) -> "ByKind":
        """Stacks a value for each layer."""
        return cls(
            tuple(
                jax.tree.map(lambda *leaves: jnp.stack(leaves), *(values[number] for number in numbers))
                for numbers in layers_of_kinds(order)
            ),
            order,
        )

    @property
    def position(self) -> Int[Array, "layers B"]:
        """Tokens consumed so far, of decode states; the same in all layers."""
        return self.kinds[0].position

    def of_layer(self, number: int) -> Any:
        """The value of one layer."""
        kind, at = places(self.order)[number]
        return jax.tree.map(lambda leaf: leaf[at], self.kinds[kind])

    def selected(self, numbers: Sequence[int]) -> "ByKind":
        """The values of some layers, in the given order, as a stack of these layers has them."""
        kinds = [self.order[number] for number in numbers]
        parts = []
        for kind in dict.fromkeys(kinds):
            own = [self.order[:number].count(kind) for number in numbers if self.order[number] == kind]
            parts.append(_taken(self.kinds[kind], own))
        return ByKind(tuple(parts), numbered(kinds))

    def in_order(self) -> Any:
        """Values of one structure for all kinds as one stack, in the order of the layers."""
        numbers = [number for each in layers_of_kinds(self.order) for number in each]
        place = jnp.asarray([numbers.index(number) for number in range(len(numbers))])
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[place], *self.kinds)


def layers_of_kinds(order: Sequence[int]) -> list[list[int]]:
    """Numbers of the layers of each kind."""
    return [[number for number, kind in enumerate(order) if kind == each] for each in range(max(order) + 1)]


def places(order: Sequence[int]) -> list[tuple[int, int]]:
    """Kind and number among those of its kind, of each layer."""
    return [(kind, order[:number].count(kind)) for number, kind in enumerate(order)]


def _taken(values: Any, numbers: Sequence[int]) -> Any:
    """Values of some layers of a stack; neighbours are a slice of it, which is no copy inside of a program."""
    first, end = numbers[0], numbers[-1] + 1
    index = slice(first, end) if [*numbers] == [*range(first, end)] else jnp.asarray(numbers)
    return jax.tree.map(lambda leaf: leaf[index], values)


def numbered(kinds: Sequence[Any]) -> tuple[int, ...]:
    """Kinds as numbers, from 0 as they first occur."""
    known = list(dict.fromkeys(kinds))
    return tuple(known.index(each) for each in kinds)


def period_of(order: Sequence[Any]) -> int:
    """The smallest number of layers whose kinds, repeated, are those of all."""
    count = len(order)
    divisors = (each for each in range(1, count + 1) if count % each == 0)
    return next(each for each in divisors if list(order[:each]) * (count // each) == list(order))


class _Run(NamedTuple):
    """Neighbours that are alike: the kinds of their values, and how many they are."""

    kinds: tuple[int, ...]
    length: int


# One layer's work: the kinds of its values, what is passed on, and the values.
Step = Callable[[tuple[int, ...], Any, tuple[Any, ...]], tuple[Any, Any]]


def over_layers(step: Step, carry: Any, values: Sequence[ByKind], *, unroll: int = 1) -> tuple[Any, ByKind]:
    """Runs `carry, output = step(kinds, carry, values)` over layers of several kinds.

    Layers whose kinds repeat are scanned by blocks of one period, and inside a block, neighbours that are alike are
    scanned: the program grows with the changes from kind to kind in a period, and not with the depth.

    Args:
        step: one layer's work.
        carry: value passed from layer to layer.
        values: of the layers; they may be of other kinds each.
        unroll: layers per step of a loop.

    Returns:
        What is passed on by the last layer, and the outputs; their kinds are the combinations of those of the values.
    """
    combined = list(zip(*(each.order for each in values), strict=True))
    period, order = period_of(combined), numbered(combined)
    blocks = len(combined) // period
    runs = _runs(combined[:period])

    def run(kinds: tuple[int, ...], length: int, carry: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """Neighbours that are alike."""
        if length > 1:
            once = partial(step, kinds)
            return jax.lax.scan(once, carry, inputs, length=length, unroll=min(unroll, length))
        carry, output = step(kinds, carry, jax.tree.map(lambda leaf: leaf[0], inputs))
        return carry, jax.tree.map(lambda leaf: leaf[None], output)

    def block(carry: Any, stacks: tuple[tuple[Any, ...], ...]) -> tuple[Any, tuple[Any, ...]]:
        parts = [_split(stack, [each.kinds[number] for each in runs], runs) for number, stack in enumerate(stacks)]
        outputs: list[list[Any]] = [[] for _ in range(max(order) + 1)]
        for at, each in enumerate(runs):
            carry, output = run(each.kinds, each.length, carry, tuple(part[at] for part in parts))
            outputs[order[combined.index(each.kinds)]].append(output)
        return carry, tuple(_joined(parts) for parts in outputs)

    stacks = tuple(each.kinds for each in values)
    if blocks == 1:
        carry, found = block(carry, stacks)
        return carry, ByKind(found, order)
    cut = jax.tree.map(lambda leaf: leaf.reshape(blocks, -1, *leaf.shape[1:]), stacks)
    carry, found = jax.lax.scan(block, carry, cut, length=blocks, unroll=max(1, unroll // period))
    return carry, ByKind(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found), order)


def _runs(kinds: Sequence[tuple[int, ...]]) -> list[_Run]:
    return [_Run(each, len(list(alike))) for each, alike in groupby(kinds)]


def _split(stacks: tuple[Any, ...], kinds: Sequence[int], runs: Sequence[_Run]) -> list[Any]:
    """The part of each run of stacks that hold a block's layers kind by kind."""
    parts: list[Any] = [None] * len(runs)
    for kind, stack in enumerate(stacks):
        own = [at for at, each in enumerate(kinds) if each == kind]
        ends = list(accumulate(runs[at].length for at in own))[:-1]
        leaves, tree = jax.tree.flatten(stack)
        # The gradient of a split is one concatenation; those of slices would be as many additions of whole stacks.
        pieces = [jnp.split(leaf, ends) for leaf in leaves]
        for number, at in enumerate(own):
            parts[at] = jax.tree.unflatten(tree, [piece[number] for piece in pieces])
    return parts


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
