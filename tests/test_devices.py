"""Devices by name, and platforms that are not there."""

import os
import subprocess
import sys

import jax
import pytest
from support.processes import ROOT

from lin_jax.devices import device_kind, devices_shown

SCRIPT = """
from lin_jax.devices import devices_shown
from lin_jax.errors import exit_cleanly

exit_cleanly(devices_shown)
"""


def test_devices_are_named() -> None:
    assert device_kind() in devices_shown()
    assert (len(jax.devices()) == 1) == (devices_shown() == device_kind())
    if jax.default_backend() == "cpu":
        assert device_kind() == f"cpu, {len(os.sched_getaffinity(0))} processors"


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform: str) -> None:
    if platform == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("it is there")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"error: JAX cannot use the platform {platform} here (")
    assert "Traceback" not in done.stderr
    assert len(lines) == 1
