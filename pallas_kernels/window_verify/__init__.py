"""Verification of a draft tree against a window and a memory under one normaliser."""

from pallas_kernels.window_verify.api import verify_window as verify_window
