"""What the dimensions of parameters and activations mean, so that a mesh of devices can be laid along them.

Parameters carry the names of their last dimensions as `axes` in their metadata; a stack's leading layer axis has no
name. Which name lies along which axis of a mesh is a training run's to say (`training.placement`).
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.over_devices import axes_along

# The residual stream, the inner width of feed-forward layers, queries of all heads, keys or values of all heads.
EMBED, MLP, HEADS, KV_HEADS, VOCABULARY = "embed", "mlp", "heads", "kv_heads", "vocabulary"
# Along which axes of a mesh rows lie, and the tokens of a row.
ROWS, TIME = ("data", "fsdp"), "sequence"

Axes = tuple[str | None, ...]
AxesByPath = Mapping[tuple[str, ...], Axes]


def axes_of(module: nnx.Module) -> dict[tuple[str, ...], Axes]:
    """The names of the dimensions of a module's variables, by path; those without names are left out."""
    found: dict[tuple[str, ...], Axes] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        axes = variable.get_metadata().get("axes")
        if axes is not None:
            found[tuple(map(str, path))] = axes
    return found


def read_whole(table: Array) -> Array:
    """A table `[V, E]` that rows are taken from: gathered along E, and what is taken lies like activations."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(size == 1 for size in mesh.shape.values()):
        return table
    cut = "tensor" if table.shape[0] % mesh.shape.get("tensor", 1) == 0 and "tensor" in mesh.shape else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(cut, None))


def along_mesh(activations: Any) -> Any:
    """A tree whose arrays `[B, T, E]` lie along the mesh of `jax.set_mesh`, rows and tokens; itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(size == 1 for size in mesh.shape.values()):
        return activations

    def lay(leaf: Array) -> Array:
        if leaf.ndim != 3:
            return leaf
        spec = PartitionSpec(axes_along(ROWS, leaf.shape[0]) or None, axes_along((TIME,), leaf.shape[1]) or None, None)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(lay, activations)
