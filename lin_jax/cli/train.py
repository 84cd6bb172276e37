"""Command `train`: `train.py CONFIG.yaml [--resume] [--section.field VALUE ...]`."""

import sys
from collections.abc import Sequence

from lin_jax.training.stages.config import Pipeline, parse_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    plan, resume, launch = parse_command(sys.argv[1:] if argv is None else argv)
    # Imported only now: help and wrong options should not wait for the checkpoint library.
    import jax

    from lin_jax.devices import device_kind, keep_freed_memory
    from lin_jax.training.run import train
    from lin_jax.training.stages.run import run_stages

    runs = [run for stage in plan.stages for run in stage.runs] if isinstance(plan, Pipeline) else [plan]
    if any("float64" in (run.model.dtype, run.model.param_dtype) for run in runs):
        jax.config.update("jax_enable_x64", True)
    keep_freed_memory()
    launch.join()
    device_kind()
    if isinstance(plan, Pipeline):
        return run_stages(plan, resume=resume)
    return train(plan, resume=resume).status
