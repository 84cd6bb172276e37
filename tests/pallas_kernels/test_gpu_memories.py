"""Running sums of memories on GPU, against a loop over blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.backends import INTERPRETED, KERNELS

from pallas_kernels.gpu.memories import Scan, running_sums

BATCH, HEADS, BLOCKS = 2, 3, 5


@pytest.mark.parametrize("implementation", [each for each in KERNELS if each not in ("tpu", "tpu_interpreted")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kept", [None, "row", "head"])
def test_running_sums(implementation, reverse, kept):
    """Sizes that are no whole parts of a program; what a block leaves is 0, 1 or in between."""
    rng = np.random.default_rng(0)
    inner = (33, 17)
    sums = rng.normal(size=(BATCH, BLOCKS, HEADS, *inner)).astype(np.float32)
    initial = rng.normal(size=(BATCH, HEADS, *inner)).astype(np.float32)
    shape = {None: (1,), "row": (BATCH, BLOCKS), "head": (BATCH, HEADS, BLOCKS)}[kept]
    keep = rng.choice([0.0, 0.3, 1.0], shape).astype(np.float32)
    scan = Scan(length=BLOCKS, block=1, blocks=BLOCKS, shift=0, reverse=reverse)
    found = running_sums(
        jnp.asarray(sums),
        jnp.asarray(initial),
        keep=jnp.asarray(keep),
        scan=scan,
        weights=kept is not None,
        interpret=implementation in INTERPRETED,
    )
    total, before = initial.astype(np.float64), np.zeros(sums.shape)
    for block in reversed(range(BLOCKS)) if reverse else range(BLOCKS):
        before[:, block] = total
        # Of a row, of a row and head, or all.
        lasts = 1.0 if kept is None else keep[..., block].reshape(BATCH, -1, 1, 1)
        total = total * lasts + sums[:, block]
    np.testing.assert_allclose(found[0], before, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], total, rtol=1e-6, atol=1e-6)
