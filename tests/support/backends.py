"""The implementations that the machine at hand can try."""

from typing import Any

import jax
import pytest

INTERPRETED: list[Any] = ["tpu_interpreted", "gpu_interpreted"]
# A process with a GPU compiles Triton kernels and cannot interpret them too.
KERNELS = {"gpu": [pytest.param("gpu", marks=pytest.mark.gpu)], "tpu": ["tpu"]}.get(jax.default_backend(), INTERPRETED)
IMPLEMENTATIONS = ["xla", *KERNELS]
