"""Hugging Face in and out: configurations and tensor names."""
