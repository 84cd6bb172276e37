"""The implementations that the machine at hand can try."""

import jax

# A process with a GPU compiles Triton kernels and cannot interpret them too.
KERNELS = {"gpu": ["gpu"], "tpu": ["tpu"]}.get(jax.default_backend(), ["tpu_interpreted", "gpu_interpreted"])
IMPLEMENTATIONS = ["xla", *KERNELS]
