"""One of two processes that step together; the second is sent a signal: `stopping_together.py PORT PROCESS`."""

import signal
import sys

import jax
import jax.numpy as jnp

from lin_jax.training.stopping import StopRequest

STEPS, SENT_AT = 40, 7


def main(port: int, process: int) -> None:
    """Prints the step before which this process stopped, and what for."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    with StopRequest() as stop:
        for step in range(STEPS):
            if (heard := stop.agreed()) is not None:
                print(step, heard.name)
                return
            if process == 1 and step == SENT_AT:
                signal.raise_signal(signal.SIGTERM)
            # The first process is ahead of its work, as a host is of its devices.
            jnp.sum(jnp.ones((300, 300)) @ jnp.ones((300, 300)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
