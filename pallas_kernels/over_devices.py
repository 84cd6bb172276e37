"""Operations on a mesh of devices: each device computes the rows and heads that it has, without communication.

The compiler cannot cut a kernel up by itself. Inside `jax.set_mesh(mesh)` rows lie along the mesh's axes `data` and
`fsdp`, and heads along `tensor`, as far as there are such axes and they divide what lies along them. Inside a
`jax.shard_map`, what it has cut already is left as it is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.mesh_axes import ROWS, TENSOR

# Letters of dimensions, and the axes of a mesh along which they may lie.
AXES: Mapping[str, tuple[str, ...]] = {"b": ROWS, "h": (TENSOR,), "k": (TENSOR,)}


def over_devices(
    run: Callable[..., Any], arguments: Any, dimensions: Any, results: Any, *, rows: int, heads: int
) -> Any:
    """Runs an operation on every device, with the device's own part of the arguments.

    Args:
        run: a function that is independent for every row and every key/value head.
        arguments: a tree of arrays.
        dimensions: the same tree with a letter for each dimension, `b` for rows, `h` and `k` for heads; entries of
            absent arrays are passed over.
        results: likewise, of what is returned.
        rows: number of rows.
        heads: number of key/value heads.
    """
    free = free_axes()
    if not free:
        return run(arguments)
    count = {"b": rows, "h": heads, "k": heads}
    along = {letter: axes_along(names, count[letter]) for letter, names in AXES.items()}

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(along.get(letter) or None for letter in letters))

    present, tree = jax.tree.flatten(arguments)
    cut = jax.shard_map(
        lambda *leaves: run(jax.tree.unflatten(tree, leaves)),
        in_specs=tuple(map(spec, _of_present(arguments, dimensions))),
        out_specs=jax.tree.map(spec, results),
        axis_names=set(free),
        check_vma=False,
    )
    return cut(*present)


def free_axes() -> Mapping[str, int]:
    """Sizes of the axes of the mesh that no enclosing `jax.shard_map` has taken; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def axes_along(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The axes along which `count` rows or heads lie: all free ones of the named, if they divide it; else none."""
    free = free_axes()
    there = tuple(name for name in names if name in free)
    return there if count % math.prod(free[name] for name in there) == 0 else ()


def _of_present(arguments: Any, dimensions: Any) -> list[str]:
    """The letters of the arrays that are there, in the order of a tree's leaves."""
    if arguments is None:
        return []
    if isinstance(arguments, tuple):
        return [each for pair in zip(arguments, dimensions, strict=True) for each in _of_present(*pair)]
    return [dimensions]
