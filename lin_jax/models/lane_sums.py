"""Products of one or two rows with narrow weights, summed in lanes: as fast as memory gives the weights.

A sum over the inputs that XLA writes as a loop adds one number after the other. Here, the inputs are dealt to the
lanes of vectors, each lane adds up a few of its own, and XLA's compiler makes vector instructions of that: weights are
widened in registers, and no addition waits for the one before. What the lanes hold is added up afterwards. Two outputs
are summed in one loop, one of each half of them, so that the row is read once for both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ordering import computed, truth

# More rows than this are slower than in other forms, which widen a weight once for all of them.
MOST_ROWS = 2
# By type of the weights: vectors that a lane adds up at most (compilers do not write out longer loops), numbers of them
# that are added up in one turn of the loop, and numbers of lanes; the fastest first.
_CHOICES = {"int8": (32, (4, 2, 1), (32, 64, 16)), "bfloat16": (8, (1,), (64, 32, 16))}
NARROW = tuple(_CHOICES)
_MOST_TURNS = 8
# Vectors that a lane adds up at least, for what the lanes hold to be small beside the weights.
_LEAST = 4
# Numbers that the lanes of all outputs of a block hold.
_HELD = 2**22


class Lanes(NamedTuple):
    """Numbers by which inputs are dealt to lanes.

    Attributes:
        turns: turns of the loop over a lane's inputs.
        vectors: inputs of a lane in each turn.
        width: number of lanes.
    """

    turns: int
    vectors: int
    width: int


def lanes_for(size_in: int, weights: str, rows: int = 1) -> Lanes | None:
    """The lanes for a number of inputs, a type of weights and a number of rows; None where that does not come out even.

    They divide the number of inputs.
    """
    if weights not in _CHOICES or rows > MOST_ROWS:
        return None
    most, vectors, widths = _CHOICES[weights]
    most = most // rows if len(vectors) > 1 else most
    fitting = [
        Lanes(turns, count, width)
        for width in widths
        for count in vectors
        for turns in range(_MOST_TURNS, 1, -1)
        if turns * count <= most and size_in % (turns * count * width) == 0
    ]
    best = max(fitting, key=lambda lanes: lanes.turns * lanes.vectors, default=None)
    return best if best is not None and best.turns * best.vectors >= _LEAST else None


def has_lanes(size_in: int, weights: str) -> bool:
    """True where there are lanes for a number of inputs and a type of weights, for all numbers of rows."""
    return all(lanes_for(size_in, weights, rows) is not None for rows in range(1, MOST_ROWS + 1))


def lane_sums(x: Float[Array, "n I"], weight: Array) -> Float[Array, "n O"]:
    """`x @ W.T` for a few rows and a matrix `[O, I]` in int8 or bfloat16, in float32 or better.

    Raises:
        ValueError: there are no lanes for these inputs, types and rows.
    """
    lanes = lanes_for(x.shape[1], weight.dtype.name, x.shape[0])
    if lanes is None:
        raise ValueError(f"no lanes for {x.shape[0]} rows of {x.shape[1]} inputs with weights in {weight.dtype.name}")
    x = computed(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    held = x.shape[0] * x.shape[1] // (lanes.turns * lanes.vectors)
    size = max(_HELD // held, 1)
    parts: list[Array] = []
    for at in range(0, weight.shape[0], size):
        parts.append(_pairs(x, weight[at : at + size], lanes))
        # One block after the other, so that all of them use the same memory.
        x = jnp.where(truth(parts[-1]), x, 0)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _pairs(x: Float[Array, "n I"], weight: Array, lanes: Lanes) -> Float[Array, "n O"]:
    """The products with some outputs, of which two are summed at a time."""
    outputs = weight.shape[0]
    half = (outputs + 1) // 2
    # Of an odd number, both halves have the one in the middle.
    parts = [_dealt(weight[:half], lanes), _dealt(weight[outputs - half :], lanes)]
    rows = _dealt(x, lanes)
    terms = [
        _added([_widened(part[:, :, :, at], x.dtype) * row[None, :, :, at] for at in range(lanes.vectors)])
        for part in parts
        for row in rows
    ]
    # Of several sums at once, XLA makes a loop of its own; a single one it hands to a library that widens all weights.
    held = jax.lax.optimization_barrier(_summed(terms))
    sums = jnp.stack([jnp.sum(each, axis=(1, 2)) for each in held]).reshape(2, x.shape[0], half)
    return jnp.concatenate([sums[0], sums[1][:, 2 * half - outputs :]], axis=1)


def _summed(terms: list[Array]) -> tuple[Array, ...]:
    """Sums over the turns of several arrays, in one loop."""
    zeros = [jnp.zeros((), each.dtype) for each in terms]
    return tuple(
        jax.lax.reduce(terms, zeros, lambda one, other: [a + b for a, b in zip(one, other, strict=True)], (2,))
    )


def _dealt(matrix: Array, lanes: Lanes) -> Array:
    """A matrix `[n, I]` as `[n, chunks, turns, vectors, lanes]`."""
    return matrix.reshape(matrix.shape[0], -1, *lanes)


def _widened(weight: Array, dtype: jnp.dtype) -> Array:
    """Weights in a wider type; those of bfloat16 by their bits, in the loop that reads them."""
    if weight.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
        weight = jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    return weight.astype(dtype)


def _added(terms: list[Array]) -> Array:
    """The sum of some arrays, by pairs."""
    while len(terms) > 1:
        terms = [sum(terms[at + 1 : at + 2], terms[at]) for at in range(0, len(terms), 2)]
    return terms[0]
