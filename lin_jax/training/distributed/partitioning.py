"""Shardings of all that a run holds: parameters, moments, batches, metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lin_jax.errors import UserError
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models.logical_axes import EMBED, HEADS, KV_HEADS, MLP, VOCABULARY, Axes, AxesByPath
from pallas_kernels.mesh_axes import FSDP, ROWS, SEQUENCE, TENSOR

# Which axes of the mesh the dimensions of parameters lie along. Where a sequence is cut up, its parts share the
# parameters' memory like those of FSDP.
RULES: Mapping[str, tuple[str, ...]] = {
    EMBED: (FSDP, SEQUENCE),
    MLP: (TENSOR,),
    HEADS: (TENSOR,),
    KV_HEADS: (TENSOR,),
    VOCABULARY: (TENSOR,),
}


@dataclass(frozen=True)
class Shardings:
    """Shardings for a run.

    Attributes:
        mesh: of all devices.
        axes: names of the dimensions of parameters, by path.
        counts: of what may not be cut apart, by the name of its dimension: key/value heads, for one.
        rules: names of dimensions to axes of the mesh.
    """

    mesh: Mesh
    axes: AxesByPath
    counts: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, mesh: Mesh, axes: AxesByPath, model: Any) -> "Shardings":
        """The placement of a model of the given configuration, and of whatever else has named dimensions."""
        heads = getattr(model, "num_heads", None)
        counts = {} if heads is None else {HEADS: heads, KV_HEADS: getattr(model, "kv_heads", heads)}
        return cls(mesh, axes, counts, RULES)

    @property
    def whole(self) -> NamedSharding:
        """All of an array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def row_parts(self) -> int:
        """Number of parts that the rows of a batch are dealt to."""
        return math.prod(self.mesh.shape.get(name, 1) for name in ROWS)

    def tree(self, tree: Any) -> Any:
        """The sharding of every array of a tree: parameters, moments that mirror them, and small things."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self._sharding(path, leaf.shape), tree)

    def parameter(self, path: Sequence[Any], shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of one variable of the model by its path, as `hub.from_pretrained` asks for it."""
        names = self.axes.get(tuple(map(str, path)), ())
        return NamedSharding(self.mesh, self._spec(names, shape))

    def place(self, tree: Any) -> Any:
        """Arrays (the same in every process) where they belong."""
        return jax.tree.map(_put, tree, self.tree(tree))

    def batch(self, batch: Batch) -> dict[str, Any]:
        """A batch, whole on this host, on the devices that its rows belong to."""
        sharding = NamedSharding(self.mesh, PartitionSpec(ROWS))
        return {name: _put(np.asarray(rows), sharding) for name, rows in batch.items()}

    def local_batch(self, rows: Batch, total: int) -> dict[str, Any]:
        """The rows that this process holds of a batch of `total` rows, as arrays over all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(ROWS))
        return {
            name: jax.make_array_from_process_local_data(sharding, np.asarray(part), (total, *part.shape[1:]))
            for name, part in rows.items()
        }

    def rows(self, total: int) -> tuple[int, int]:
        """Rows of a global batch that this process holds: from the first to before the second.

        Raises:
            UserError: they are not side by side.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(ROWS))
        held = {
            (index[0].start or 0, total if index[0].stop is None else index[0].stop)
            for index in sharding.addressable_devices_indices_map((total,)).values()
            if index is not None
        }
        start, stop = min(begin for begin, _ in held), max(end for _, end in held)
        if sum(end - begin for begin, end in held) != stop - start:
            raise UserError("the mesh gives this process rows that are not side by side; make mesh.tensor smaller")
        return start, stop

    def check(self, batch_size: int, gradient_accumulation: int, length: int) -> None:
        """Refuses sizes that the mesh does not divide.

        Args:
            batch_size: rows of a step.
            gradient_accumulation: parts that they are taken in.
            length: tokens of a row.

        Raises:
            UserError: rows, tokens or heads cannot be dealt out evenly.
        """
        if batch_size % (gradient_accumulation * self.row_parts):
            raise UserError(
                f"training.batch_size {batch_size} is not a multiple of training.gradient_accumulation "
                f"{gradient_accumulation} times mesh.data x mesh.fsdp {self.row_parts}; change one of them"
            )
        sequence, tensor = self.mesh.shape.get(SEQUENCE, 1), self.mesh.shape.get(TENSOR, 1)
        if length % sequence:
            raise UserError(f"data.sequence_length {length} is not a multiple of mesh.sequence {sequence}; change one")
        if self.counts.get(HEADS, tensor) % tensor:
            raise UserError(
                f"model.num_heads {self.counts[HEADS]} is not a multiple of mesh.tensor {tensor}; change one"
            )

    def _sharding(self, path: Any, shape: tuple[int, ...]) -> NamedSharding:
        """By the longest end of a path that names a parameter: moments mirror the parameters' tree."""
        parts = tuple(_name(part) for part in path)
        if parts and parts[-1] == "value":  # In a module, and not in a plain tree.
            parts = parts[:-1]
        for start in range(len(parts)):
            names = self.axes.get(parts[start:])
            if names is not None and len(names) <= len(shape):
                return NamedSharding(self.mesh, self._spec(names, shape))
        return self.whole

    def _spec(self, names: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The axes of the mesh for the last dimensions of an array; each axis is used once."""
        used: set[str] = set()
        spec: list[tuple[str, ...] | None] = [None] * (len(shape) - len(names))
        for name, size in zip(names, shape[len(spec) :], strict=True):
            along = [
                axis
                for axis in (() if name is None else self.rules.get(name, ()))
                if self.mesh.shape.get(axis, 1) > 1 and axis not in used
            ]
            whole = math.gcd(size, self.counts.get(name or "", size))
            while along and whole % math.prod(self.mesh.shape[axis] for axis in along):
                along.pop()
            used.update(along)
            spec.append(tuple(along) or None)
        return PartitionSpec(*spec)


def _name(part: Any) -> str:
    """One step of a path through a tree."""
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _put(array: Any, sharding: NamedSharding) -> Any:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        # Read onto the devices of all processes already: none has the whole of it.
        lies_there = array.sharding.is_equivalent_to(sharding, array.ndim)
        return array if lies_there else jax.jit(lambda whole: whole, out_shardings=sharding)(array)
    if sharding.is_fully_addressable or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
