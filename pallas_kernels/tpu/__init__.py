"""Parts that Pallas kernels for TPU share."""
