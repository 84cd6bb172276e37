"""One of two processes that step together; the second is sent a signal: `stopping_together.py PORT PROCESS`."""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lin_jax.training.distributed.preemption import StopSignal

STEPS, SENT_AT = 40, 7


def main(port: int, process: int) -> None:
    """Prints the step before which this process stopped, and what for."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    with jax.set_mesh(mesh), StopSignal() as stop:
        work = jax.jit(lambda x: jnp.sum(x @ x), out_shardings=NamedSharding(mesh, PartitionSpec()))
        split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
        newest = weights = jax.device_put(np.ones((300, 300), np.float32), split)
        for step in range(STEPS):
            if (heard := stop.poll(newest)) is not None:
                print(step, heard.name)
                return
            if process == 1 and step == SENT_AT:
                signal.raise_signal(signal.SIGTERM)
            newest = work(weights)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
