"""One run on many machines: how its processes find each other, before JAX is used for anything else."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Timer
from typing import Literal

import jax

from lin_jax.errors import UserError

log = logging.getLogger(__name__)

# Variables that a cluster sets for each of the processes of a job, and the least number that means more than one.
_SIGNS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Where they say which of the processes this is.
_NUMBERS = {"SLURM_NTASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
# Seconds after which a process says that it waits for others; JAX itself gives up after minutes.
_PATIENCE = 5.0
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class Launch:
    """Options by which a process joins the others of its run; the same run may go on with other ones.

    Attributes:
        cluster: join the processes that SLURM, Open MPI, Kubernetes or a TPU pod has started: `auto` where there are
            signs of several, `always`, or `never`.
        coordinator: address HOST:PORT of process 0, where no cluster tells; any free port.
        processes: how many processes there are, with coordinator.
        process: number of this one, from 0, with coordinator.
    """

    cluster: Literal["auto", "always", "never"] = "auto"
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [each is not None for each in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise UserError("launch.coordinator, launch.processes and launch.process belong together; give all three")
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise UserError(f"launch.process is {self.process}; give a number from 0 to {self.processes - 1}")

    def join(self) -> None:
        """Waits for the other processes, if there are any.

        Raises:
            UserError: they are not found.
        """
        if self.coordinator is None and (self.cluster == "never" or (self.cluster == "auto" and not _in_cluster())):
            return
        try:
            with _waiting_told(self._awaited()):
                jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (RuntimeError, ValueError) as error:
            if self.cluster == "auto" and self.coordinator is None and not _signs():
                return  # A machine with a TPU of its own is no pod.
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the processes of this run do not find each other: {reason}; give --launch.coordinator HOST:PORT, "
                "--launch.processes N and --launch.process I, or --launch.cluster never to run alone"
            ) from error

    def _awaited(self) -> str:
        """Says which process this is, for whom it waits, and what to do if they do not come."""
        if self.processes is not None:
            return f"process {self.process} of {self.processes} waits for the others at {self.coordinator}; start all"
        for size, number in _NUMBERS.items():
            count, own = os.environ.get(size, ""), os.environ.get(number, "0")
            if count.isdigit() and int(count) > 1:
                launcher = "srun" if size.startswith("SLURM") else "mpirun"
                others = [str(each) for each in range(int(count)) if str(each) != own]
                named = ", ".join(others) if len(others) < 9 else f"{len(others)} others"
                return (
                    f"process {own} of {count} ({size}) waits for {named}; start each with {launcher}, or give "
                    "--launch.cluster never to run alone"
                )
        return "this process waits for others of its cluster; start them, or give --launch.cluster never to run alone"


@contextmanager
def _waiting_told(text: str) -> Iterator[None]:
    """Warns if what is done inside takes long."""
    timer = Timer(_PATIENCE, log.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_cluster() -> bool:
    return _signs() or importlib.util.find_spec("libtpu") is not None


def _signs() -> bool:
    """True if a cluster says that this is one of several processes."""
    several = any(os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1 for name in _SIGNS)
    return several or all(name in os.environ for name in _KUBERNETES)
