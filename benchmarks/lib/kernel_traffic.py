"""Bytes that Pallas programs move between HBM and VMEM, read off their grids: no device is needed.

A pipeline fetches a block of an input when its index is another one than at the step before, and writes a block of an
output when it is left. What a kernel copies by itself is not counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import numpy as np


@dataclass(frozen=True)
class Traffic:
    """Bytes that one program moves.

    Attributes:
        name: of the program.
        read: bytes.
        written: bytes.
    """

    name: str
    read: int
    written: int


def traffic_of(function: Callable[..., Any], *arguments: Any) -> list[Traffic]:
    """The traffic of every Pallas program that a function calls, in order; nothing is run."""
    return [_traffic(call) for call in _calls(jax.make_jaxpr(function)(*arguments).jaxpr)]


def _calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner)


def _traffic(call: Any) -> Traffic:
    mapping = call.params["grid_mapping"]
    counts = [0, 0]
    for number, block in enumerate(mapping.block_mappings):
        counts[number >= mapping.num_inputs] += _bytes(block, mapping.grid)
    name = call.params.get("name") or getattr(call.params.get("name_and_src_info"), "name", "pallas_call")
    return Traffic(str(name), *counts)


def _bytes(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes of an array that cross over: those of a block for every step at which another one is needed."""
    array = block.array_aval
    sizes = [1 if (size := _size(each)) is None else size for each in block.block_shape]
    steps = np.indices(grid, np.int32).reshape(len(grid), -1)
    scalars = len(block.index_map_jaxpr.jaxpr.invars) - len(grid)
    index_map = jax.vmap(
        jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr), in_axes=(0,) * len(grid) + (None,) * scalars
    )
    found = index_map(*steps, *(np.int32(0),) * scalars)
    places = np.stack([np.broadcast_to(each, steps.shape[1:]) for each in found])
    moves = np.append(True, np.any(places[:, 1:] != places[:, :-1], axis=0))
    # What hangs over the end of the array is not moved.
    begins = places * np.array(sizes)[:, None]
    lengths = np.minimum(np.array(sizes)[:, None], np.array(array.shape)[:, None] - begins)
    return int(np.sum(np.prod(lengths, axis=0), where=moves)) * array.dtype.itemsize


def _size(dimension: Any) -> int | None:
    """The size of a block's dimension, None where it has none."""
    return dimension if isinstance(dimension, int) else getattr(dimension, "block_size", None)
