"""TPUs that need not be there: the compiler of real ones says what a train step would hold and do.

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
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from lin_jax.errors import UserError  # noqa: E402
from lin_jax.models import LlamaConfig  # noqa: E402
from lin_jax.models.logical_axes import ROWS, axes_of  # noqa: E402
from lin_jax.training.config import OptimizerConfig  # noqa: E402
from lin_jax.training.objectives.language_model import LanguageModel  # noqa: E402
from lin_jax.training.optimizer import build_optimizer  # noqa: E402
from lin_jax.training.placement import Placement  # noqa: E402
from lin_jax.training.step import TrainState, make_step  # noqa: E402


def mesh_of(topology: str, axis: str) -> Mesh:
    """All chips of a topology such as v5e:16x16, along one axis of a run's mesh."""
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as problem:
        raise UserError(f"no chips like '{topology}': {str(problem).splitlines()[0]}; is libtpu installed?") from None
    names = ("data", "fsdp", "tensor", "sequence")
    return Mesh(np.array(devices).reshape([-1 if name == axis else 1 for name in names]), names)


def lowered_step(config: LlamaConfig, mesh: Mesh, rows: int, length: int) -> Any:
    """The step of the package's own training loop on packed rows, on arrays that are shapes only, where they lie."""
    objective = LanguageModel(config)
    optimizer = build_optimizer(OptimizerConfig(), 1000)
    axes = {path: names for module in objective.modules() for path, names in axes_of(module).items()}
    placement = Placement.of(mesh, axes, config)
    state = jax.eval_shape(lambda params: TrainState.new(params, optimizer, jax.random.key(0)), objective.shapes())
    state = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, placement.tree(state))
    dealt = NamedSharding(mesh, PartitionSpec(ROWS))
    part = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32, sharding=dealt)
    step = make_step(objective, optimizer, placement=placement, state=state)
    return step.lower(state, {}, {"tokens": part, "documents": part})


def bytes_per_chip(compiled: Any) -> tuple[int, int]:
    """What a chip holds from step to step, and what else at some time in between."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held, memory.temp_size_in_bytes
