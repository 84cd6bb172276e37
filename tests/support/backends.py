"""The implementations that the machine at hand can try."""

from typing import Any

import jax
import pytest
from support.cells import cells

INTERPRETED: list[Any] = ["tpu_interpreted", "gpu_interpreted"]
# A process with a GPU compiles Triton kernels and cannot interpret them too.
KERNELS = {"gpu": [pytest.param("gpu", marks=pytest.mark.gpu)], "tpu": ["tpu"]}.get(jax.default_backend(), INTERPRETED)
IMPLEMENTATIONS = ["xla", *KERNELS]
# For cells whose XLA is what other tests compare with anyway; it is tried too by `make test-all`.
KERNELS_FIRST = cells(IMPLEMENTATIONS[1:], IMPLEMENTATIONS[:1])
ONE_KERNEL = cells(IMPLEMENTATIONS[1:2], [IMPLEMENTATIONS[0], *IMPLEMENTATIONS[2:]])
# For cells that need not be tried with each of them every time: the last of several is for `make test-all`.
FEWER = cells(IMPLEMENTATIONS[:2], IMPLEMENTATIONS[2:])
