"""Kernels are compiled by the compilers of the devices they are for; no device is needed."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from support.cells import cells
from support.processes import IMPORTED, printed

# Where `make test` puts the TPU compiler.
COMPILER = Path(sys.prefix) / "libtpu"
# A process without a TPU must not look for one.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
# Beside another compiler, that of a benchmark for one.
ALONE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.skipif(not COMPILER.is_dir(), reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "cases"), cells([("v5e:2x2", 1)], [("v5e:2x2", 5), ("v6e:2x2", 5)]))
def test_the_tpu_compiler_takes_every_kernel(topology, cases):
    path = f"{IMPORTED}{os.pathsep}{COMPILER}"
    lines = printed("compile_for_tpu.py", topology, str(cases), **ALONE, PYTHONPATH=path)
    # Forward is one program, backward another one; a tree takes one, and so does a path.
    kernels = {"forward": 1, "backward": 2, "verify": 1, "commit": 1}
    counted = [(line.split()[-3].rstrip(":"), int(line.split()[-2])) for line in lines]
    trees = 3 if cases > 1 else 2
    assert len(counted) == 4 * cases + 2 * max(cases - 1, 1) + 3 * trees
    assert all(count == kernels[name] for name, count in counted), lines


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_kernels_keep_to_their_registers():
    """A few rows of the table; `compile_for_gpu.py --all` compiles every one."""
    lines = printed("compile_for_gpu.py")
    pattern = re.compile(r"sm_(\d+) (\w+) (\w+) .*: (\d+) registers, (\d+) bytes spilled, (\d+) bytes shared")
    seen = [pattern.fullmatch(line).groups() for line in lines]
    assert {capability for capability, *_ in seen} == {"80", "90"}
    assert len({each[1:3] for each in seen}) == 15
    assert all(int(each[4]) == 0 for each in seen), lines
    # What a block may have on an A100.
    assert all(int(each[5]) <= 163 * 1024 for each in seen), lines
