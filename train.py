"""Trains a model, or draft heads for one: `python train.py CONFIG.yaml [--resume] [--section.field VALUE ...]`."""

import logging
import sys

from lin_jax.errors import exit_cleanly
from lin_jax.training import parse_run_config


def main() -> int:
    """Runs the command line; returns the exit status."""
    config, resume, launch = parse_run_config(sys.argv[1:])
    # Imported only now: help and wrong options should not wait for the checkpoint library.
    import jax

    from lin_jax.training.loop import train

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if "float64" in (config.model.dtype, config.model.param_dtype):
        jax.config.update("jax_enable_x64", True)
    launch.join()
    return train(config, resume=resume).status


if __name__ == "__main__":
    exit_cleanly(main)
