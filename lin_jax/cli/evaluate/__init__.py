"""Command `evaluate`: what a model is worth on text, on questions and on this machine."""

from lin_jax.cli.evaluate.options import main as main
