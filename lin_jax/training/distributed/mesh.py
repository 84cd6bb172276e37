"""The mesh of devices that a run is laid along, by configuration: one device, a slice, or many machines."""

import math
from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh

from lin_jax.errors import UserError
from pallas_kernels.mesh_axes import DATA


@dataclass(frozen=True)
class MeshConfig:
    """Numbers of devices along each axis of the mesh; the devices of all processes count.

    Attributes:
        data: copies of the parameters, each with rows of its own; null takes all devices that the other axes leave.
        fsdp: parts that parameters and moments are cut into (fully sharded data parallelism); rows are dealt to them
            as well.
        tensor: parts that heads, feed-forward layers and the vocabulary are cut into.
        sequence: parts that rows are cut into, along time.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            size = getattr(self, each.name)
            if size is not None and size < 1:
                raise UserError(f"mesh.{each.name} is {size}; give 1 or more")

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis, on so many devices.

        Raises:
            UserError: the devices cannot be laid out so.
        """
        sizes = {each.name: getattr(self, each.name) for each in fields(self)}
        others = math.prod(size for size in sizes.values() if size is not None)
        sizes[DATA] = sizes[DATA] or max(devices // others, 1)
        if math.prod(sizes.values()) != devices:
            asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(
                f"mesh {asked} does not make {devices} devices; choose sizes whose product is {devices}, "
                "or leave mesh.data null to take the devices that are left"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices of all processes, or of the given ones, near ones side by side.

    Raises:
        UserError: the devices cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
