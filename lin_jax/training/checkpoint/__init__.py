"""Checkpoints of a run: written in the background, verified by checksums, read back exactly."""
