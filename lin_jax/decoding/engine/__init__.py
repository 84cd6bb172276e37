"""Compiled decode loop and its parts: prefill, slots, sampling, stop strings, prefix cache."""
