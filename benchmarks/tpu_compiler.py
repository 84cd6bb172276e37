"""TPUs that need not be there: the compiler of real ones says what a program would hold and do.

Import it before jax. It needs the package libtpu (`make test` puts it into .venv/libtpu).
"""

import os
import sys
from pathlib import Path
from typing import Any

COMPILER = Path(sys.prefix) / "libtpu"
# A process without a TPU must not look for one; the compiler is found beside jax.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
sys.path.append(str(COMPILER))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from lin_jax.errors import UserError  # noqa: E402


def mesh_of(topology: str, axis: str) -> Mesh:
    """All chips of a topology such as v5e:16x16, along one axis."""
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as problem:
        raise UserError(f"no chips like '{topology}': {str(problem).splitlines()[0]}; is libtpu installed?") from None
    return Mesh(np.array(devices), (axis,))


def cut(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A shape, cut along the first dimension that the chips divide; layers stay together."""
    names: list[str | None] = [None] * len(leaf.shape)
    along = next((index for index, size in enumerate(leaf.shape) if index and size % mesh.devices.size == 0), None)
    if along is not None:
        names[along] = mesh.axis_names[0]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))
