"""One run on many machines: how its processes find each other, before JAX is used for anything else."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import jax

from lin_jax.errors import UserError

# Variables that a cluster sets for each of the processes of a job, and the least number that means more than one.
_SIGNS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
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
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (RuntimeError, ValueError) as error:
            if self.cluster == "auto" and self.coordinator is None and not _signs():
                return  # A machine with a TPU of its own is no pod.
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the processes of this run do not find each other: {reason}; give --launch.coordinator HOST:PORT, "
                "--launch.processes N and --launch.process I, or --launch.cluster never to run alone"
            ) from error


def _in_cluster() -> bool:
    return _signs() or importlib.util.find_spec("libtpu") is not None


def _signs() -> bool:
    """True if a cluster says that this is one of several processes."""
    several = any(os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1 for name in _SIGNS)
    return several or all(name in os.environ for name in _KUBERNETES)
