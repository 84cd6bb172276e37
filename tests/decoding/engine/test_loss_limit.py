"""Limits on what drafted steps may lose."""

import jax
import numpy as np
import pytest

from lin_jax.decoding.engine.step_loops import LossLimit


@pytest.mark.parametrize("cost", [*np.linspace(1.01, 9, 60).tolist(), 2.77])
def test_just_what_a_step_may_lose_permits_it_however_it_is_rounded(cost):
    """The host rounds `cost - 1` once, the device `cost` before it subtracts: copies came back after every step."""
    limit = LossLimit(np.float32(cost), np.float32(cost - 1))
    permits = jax.jit(lambda limit, lost: limit.permits(lost))
    assert permits(limit, np.float32(0))
    assert not permits(limit, np.float32(0.01))
