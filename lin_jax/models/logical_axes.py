"""Logical names of the dimensions of parameters and activations, along which a mesh of devices is laid.

Parameters carry the names of their last dimensions as `axes` in their metadata; a stack's leading layer axis has no
name. A training run maps the names to the axes of a mesh (`training.distributed.partitioning`).
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.mesh_axes import ROWS, SEQUENCE, TENSOR
from pallas_kernels.over_devices import axes_along

# The residual stream, the inner width of feed-forward layers, queries of all heads, keys or values of all heads.
EMBED, MLP, HEADS, KV_HEADS, VOCABULARY = "embed", "mlp", "heads", "kv_heads", "vocabulary"

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
    """A table `[V, E]` to look rows up in: gathered along E, so that the rows lie like activations."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(size == 1 for size in mesh.shape.values()):
        return table
    cut = TENSOR if table.shape[0] % mesh.shape.get(TENSOR, 1) == 0 and TENSOR in mesh.shape else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(cut, None))


def along_mesh(activations: Any) -> Any:
    """Constrains the arrays `[B, T, E]` of a tree to lie along the mesh of `jax.set_mesh`, by rows and tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(size == 1 for size in mesh.shape.values()):
        return activations

    def lay(leaf: Array) -> Array:
        if leaf.ndim != 3:
            return leaf
        rows, tokens = axes_along(ROWS, leaf.shape[0]), axes_along((SEQUENCE,), leaf.shape[1])
        spec = PartitionSpec(rows or None, tokens or None, None)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(lay, activations)
