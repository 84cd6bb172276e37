"""Trains a model, draft heads, or several stages: `train.py CONFIG.yaml [--resume] [--section.field VALUE ...]`."""

from lin_jax.cli.train import main
from lin_jax.errors import exit_cleanly

if __name__ == "__main__":
    exit_cleanly(main)
