"""A small state, and one process of several that restore and save it together.

`shared_state.py PORT COUNT INDEX THERE HERE` restores what is in the run folder THERE, prints it, goes one checkpoint
back, prints that, and saves into HERE. Each process has two devices; matrices are split over all of them.
"""

import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.monitoring.spike_detection import LossHistory
from lin_jax.training.train_step import TrainState

METADATA = CheckpointMetadata(
    objective="language_model", model={"width": 8}, tokenizer="t", parameters={"w": "float32[8,4]"}
)


def mesh():
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def state_of(step, rows=8):
    """The state of a step: its matrices split over the devices, the rest on all of them."""
    split, everywhere = (NamedSharding(mesh(), PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    matrix = np.random.default_rng(step).normal(size=(rows, 4)).astype(np.float32)
    put = jax.device_put
    return TrainState(
        params={"w": put(matrix, split)},
        optimizer={"m": put(matrix / 8, split), "count": put(np.asarray(step, np.int32), everywhere)},
        step=put(np.asarray(step, np.int32), everywhere),
        key=jax.jit(lambda: jax.random.fold_in(jax.random.key(7), step), out_shardings=everywhere)(),
        history=jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), LossHistory.new(4)),
    )


def whole(state):
    """The values of a state, from all processes, as JSON has them."""
    parts = (state.params, state.optimizer, state.step, jax.random.key_data(state.key))
    leaves = jax.tree.leaves(multihost_utils.process_allgather(parts, tiled=True))
    return [np.asarray(leaf).tolist() for leaf in leaves]


def show(restored):
    """A restored state as a line of JSON."""
    weight = restored.state.params["w"]
    shard = weight.sharding.shard_shape(weight.shape)
    print(json.dumps({"step": restored.step, "data": restored.data, "whole": whole(restored.state), "shard": shard}))


def main(port, count, index, there, here):
    """Restores, goes one back, and saves."""
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(count), process_id=int(index))
    with Checkpoints(Path(there)) as checkpoints:
        like = state_of(0)
        show(checkpoints.restore_latest(like, METADATA))
        show(checkpoints.restore_before(2, like, METADATA))
    with Checkpoints(Path(here)) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, state_of(step), {"read": step, "by": int(index)}, METADATA)


if __name__ == "__main__":
    main(*sys.argv[1:])
