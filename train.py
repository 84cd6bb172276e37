"""Trains a model, draft heads, or several stages: `train.py CONFIG.yaml [--resume] [--section.field VALUE ...]`."""

import logging
import sys

from lin_jax.errors import exit_cleanly
from lin_jax.training.pipeline import Pipeline, parse_command


def main() -> int:
    """Runs the command line; returns the exit status."""
    plan, resume, launch = parse_command(sys.argv[1:])
    # Imported only now: help and wrong options should not wait for the checkpoint library.
    import jax

    from lin_jax.training.loop import train
    from lin_jax.training.stages import run_stages

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    runs = [run for stage in plan.stages for run in stage.runs] if isinstance(plan, Pipeline) else [plan]
    if any("float64" in (run.model.dtype, run.model.param_dtype) for run in runs):
        jax.config.update("jax_enable_x64", True)
    launch.join()
    if isinstance(plan, Pipeline):
        return run_stages(plan, resume=resume)
    return train(plan, resume=resume).status


if __name__ == "__main__":
    exit_cleanly(main)
