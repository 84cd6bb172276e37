"""Linearized language models in JAX, decoded with lossless tree speculation on a constant-size state."""

__version__ = "0.1.0"
