"""Parts that Triton kernels share: launching, building blocks, memories."""
