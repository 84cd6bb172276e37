"""Kernels are compiled by the compilers of the devices they are for; no device is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where `make test` puts the TPU compiler.
COMPILER = Path(sys.prefix) / "libtpu"
# A process without a TPU must not look for one.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


@pytest.mark.skipif(not COMPILER.is_dir(), reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_the_tpu_compiler_takes_every_kernel(topology):
    command = [sys.executable, Path(__file__).with_name("compile_for_tpu.py"), topology]
    environment = os.environ | ALONE | {"PYTHONPATH": f"{ROOT}{os.pathsep}{COMPILER}", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    # Forward is one program, backward another one; a tree takes one, and so does a path.
    kernels = {"forward": 1, "backward": 2, "verify": 1, "commit": 1}
    counted = [(line.split()[-3].rstrip(":"), int(line.split()[-2])) for line in lines]
    assert len(counted) == 26
    assert all(count == kernels[name] for name, count in counted), lines
