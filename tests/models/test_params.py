"""Fingerprints of parameters: the host and the device add up the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.models import params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8"])
def test_checksums_of_host_and_device(dtype, x64):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 9, dtype)
    assert int(params._checksum(values)) == int(params._checksum_on_device(values))
    assert int(params._checksum(np.asarray(values))) == int(params._checksum_on_device(values))
    other = values.at[1, 2, 3].add(1)
    assert int(params._checksum(other)) != int(params._checksum(values))


def test_large_arrays_stay_on_the_device(monkeypatch):
    monkeypatch.setattr(params, "_SMALL", 4)
    values = jnp.arange(5.0)
    monkeypatch.setattr(params, "_checksum_on_device", lambda found: found)
    assert isinstance(params._checksum(values), jax.Array)
    assert isinstance(params._checksum(values[:4]), np.uint32)
