"""Operations on a mesh of devices: each computes the rows and heads that it has, for which it needs nobody.

The compiler cannot cut a kernel up by itself. Inside `jax.set_mesh(mesh)` rows lie along the mesh's axes `data` and
`fsdp`, and heads along `tensor`, as far as there are such axes and they divide what lies along them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

# Letters of dimensions, and the axes of a mesh along which they may lie.
AXES: Mapping[str, tuple[str, ...]] = {"b": ("data", "fsdp"), "h": ("tensor",), "k": ("tensor",)}


def over_devices(
    run: Callable[..., Any], arguments: Any, dimensions: Any, results: Any, *, rows: int, heads: int
) -> Any:
    """`run(arguments)`, on every device with its part.

    Args:
        run: what is independent for every row and every key/value head.
        arguments: a tree of arrays.
        dimensions: the same tree with a letter for each dimension, `b` for rows, `h` and `k` for heads; entries of
            absent arrays are passed over.
        results: likewise, of what is returned.
        rows: how many there are.
        heads: how many key/value heads there are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = {"b": rows, "h": heads, "k": heads}
    along: dict[str, tuple[str, ...]] = {}
    for letter, names in AXES.items():
        there = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
        size = 1
        for name in there:
            size *= mesh.shape[name]
        if there and count[letter] % size == 0:
            along[letter] = there
    if not along:
        return run(arguments)

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(along.get(letter) for letter in letters))

    present, tree = jax.tree.flatten(arguments)
    cut = jax.shard_map(
        lambda *leaves: run(jax.tree.unflatten(tree, leaves)),
        in_specs=tuple(map(spec, _of_present(arguments, dimensions))),
        out_specs=jax.tree.map(spec, results),
        check_vma=False,
    )
    return cut(*present)


def _of_present(arguments: Any, dimensions: Any) -> list[str]:
    """The letters of the arrays that are there, in the order of a tree's leaves."""
    if arguments is None:
        return []
    if isinstance(arguments, tuple):
        return [each for pair in zip(arguments, dimensions, strict=True) for each in _of_present(*pair)]
    return [dimensions]
