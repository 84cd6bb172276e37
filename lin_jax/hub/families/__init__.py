"""Hugging Face checkpoints, one model family a file: configurations and tensor names."""
