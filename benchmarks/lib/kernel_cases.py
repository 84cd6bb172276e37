"""The operations of `pallas_kernels` as the benchmark runs them: inputs, programs, and least bytes and operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.augmented_attention import augmented_attention
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.tree_verify import verify_tree
from pallas_kernels.types import AugmentedState, TreeArrays, WindowedState
from pallas_kernels.window_verify import verify_window
from pallas_kernels.windowed_attention import FeatureWeights, windowed_attention

GROUP, TAPS = 64, 32
# Tokens that pairs are counted in, for the operations at the least: a product of all of them costs more, a memory for
# each token too.
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """Rows B of T tokens, with H heads of size D."""

    batch: int
    length: int
    heads: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch},{self.length},{self.heads},{self.size}"

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.batch * self.length

    @property
    def elements(self) -> int:
        """Numbers in queries, keys, values or outputs."""
        return self.tokens * self.heads * self.size


@dataclass(frozen=True)
class Operation:
    """An operation on rows.

    Attributes:
        name: of the operation.
        more: shapes of what follows queries, keys and values; the first axis of each is that of the heads.
        run: `run(*arrays, implementation=...) -> outputs`.
        positive: whether queries and keys are.
    """

    name: str
    more: Callable[[Shape], list[tuple[int, ...]]]
    run: Callable[..., jax.Array]
    positive: bool = False

    def structs(self, shape: Shape, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Shapes and types of queries, keys, values, and what else there is."""
        rows = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.size), jnp.dtype(dtype))
        return [rows] * 3 + [jax.ShapeDtypeStruct(each, jnp.float32) for each in self.more(shape)]

    def inputs(self, shape: Shape, dtype: Any) -> list[jax.Array]:
        """All of them, drawn at random."""
        rng = np.random.default_rng(0)
        drawn = [rng.standard_normal(each.shape, np.float32) for each in self.structs(shape, dtype)]
        if self.positive:
            drawn[:2] = [np.abs(each) for each in drawn[:2]]
        return [jnp.asarray(one, like.dtype) for one, like in zip(drawn, self.structs(shape, dtype), strict=True)]

    def few_heads(self, arrays: list[jax.Array], count: int) -> list[jax.Array]:
        """The first row of a few heads alone, on which the others do not depend."""
        return [*(each[:1, :, :count] for each in arrays[:3]), *(each[:count] for each in arrays[3:])]


def _augmented(queries: Any, keys: Any, values: Any, alpha: Any, taps: Any, *, implementation: Any) -> jax.Array:
    options = {"group_size": GROUP, "alpha": alpha, "taps": taps, "implementation": implementation}
    return augmented_attention(queries, keys, values, **options)[0]


def _linear(queries: Any, keys: Any, values: Any, *, implementation: Any) -> jax.Array:
    return linear_attention(queries, keys, values, floor=0.0, implementation=implementation)[0]


def _decayed(queries: Any, keys: Any, values: Any, *, implementation: Any) -> jax.Array:
    decay = 1 - 2.0 ** -jnp.linspace(5, 12, keys.shape[2])
    return linear_attention(queries, keys, values, decay=decay, implementation=implementation)[0]


def _windowed(queries: Any, keys: Any, values: Any, asked: Any, held: Any, *, implementation: Any) -> jax.Array:
    """Own and previous group, and a memory by learnt exponential features that does not decay."""
    weights = FeatureWeights(*(each / asked.shape[1] ** 0.5 for each in (asked, held)))
    options = {"group_size": GROUP, "scale": keys.shape[3] ** -0.5, "features": "exponential"}
    return windowed_attention(queries, keys, values, weights, **options, implementation=implementation)[0]


OPERATIONS = {
    each.name: each
    for each in (
        Operation("augmented", lambda shape: [(shape.heads,), (shape.heads, TAPS)], _augmented),
        Operation("linear", lambda shape: [], _linear, positive=True),
        Operation("decayed", lambda shape: [], _decayed),
        Operation("windowed", lambda shape: [(shape.heads, 2 * shape.size, shape.size)] * 2, _windowed),
    )
}


def forward(operation: Operation, implementation: str) -> Any:
    """The outputs, as a compiled program."""
    return jax.jit(lambda *arrays: operation.run(*arrays, implementation=implementation))


def forward_and_backward(operation: Operation, implementation: str) -> Any:
    """Outputs, and the gradients of all arrays given the outputs' own values as theirs, as a compiled program."""

    @jax.jit
    def program(*arrays: jax.Array) -> Any:
        outputs, pull = jax.vjp(partial(operation.run, implementation=implementation), *arrays)
        return outputs, pull(outputs)

    return program


def least_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Bytes of reading queries, keys, values and writing outputs once; backward reads four and writes three more."""
    return shape.elements * itemsize * (11 if backward else 4)


def least_operations(shape: Shape, backward: bool) -> int:
    """Operations of pairs in a chunk and of the memory between chunks; backward takes two and a half times as many."""
    forward = shape.tokens * shape.heads * (2 * CHUNK * shape.size + 4 * shape.size**2)
    return int(3.5 * forward) if backward else forward


def verify_inputs(attention: str, nodes: int, batch: int, heads: int, size: int, dtype: Any) -> tuple[Any, ...]:
    """Nodes, a tree, a state of the `augmented` or the `windowed` attention, and its parameters, drawn at random."""
    rng = np.random.default_rng(0)

    def random(*shape: int, kind: Any = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), kind)

    parents = [-1, *(int(rng.integers(max(0, node - 8), node)) for node in range(1, nodes))]
    ancestors = np.eye(nodes, dtype=bool)
    for node, parent in enumerate(parents[1:], 1):
        ancestors[node] |= ancestors[parent]
    tree = TreeArrays(jnp.asarray(ancestors.sum(axis=1) - 1), jnp.asarray(ancestors))
    rows, position = [random(batch, nodes, heads, size) for _ in range(3)], rng.integers(GROUP, 4 * GROUP, batch)
    if attention == "windowed":
        # Own and previous group, four sinks, and Hedgehog's features, two for each number of a head.
        memory = jnp.abs(random(batch, heads, 2 * size, size + 1, kind=jnp.float32))
        ring, sinks = ([random(batch, count, heads, size) for _ in range(2)] for count in (2 * GROUP, 4))
        held = WindowedState(memory, *ring, None, None, jnp.asarray(position), *sinks)
        return (*rows, tree, held, *(random(heads, size, size, kind=jnp.float32) / size**0.5 for _ in range(2)))
    state = AugmentedState(
        random(batch, heads, size, size, kind=jnp.float32),
        random(batch, GROUP, heads, size),
        random(batch, GROUP, heads, size),
        random(batch, TAPS - 1, heads, size),
        jnp.asarray(position),
    )
    return (*rows, tree, state, random(heads, kind=jnp.float32), random(heads, TAPS, kind=jnp.float32))


def verify(attention: str, implementation: str) -> Any:
    """Verification of a tree, as a compiled program of what `verify_inputs` draws."""

    @jax.jit
    def by_window(
        queries: Any, keys: Any, values: Any, tree: TreeArrays, state: WindowedState, asked: Any, held: Any
    ) -> jax.Array:
        options = {"features": "hedgehog", "group_size": GROUP, "scale": keys.shape[3] ** -0.5}
        weights = FeatureWeights(asked, held)
        return verify_window(queries, keys, values, weights, tree, state, **options, implementation=implementation)

    @jax.jit
    def program(
        queries: Any, keys: Any, values: Any, tree: TreeArrays, state: AugmentedState, alpha: Any, taps: Any
    ) -> jax.Array:
        return verify_tree(queries, keys, values, tree, state, alpha=alpha, taps=taps, implementation=implementation)

    return by_window if attention == "windowed" else program
