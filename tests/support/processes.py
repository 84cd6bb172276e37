"""Scripts of tests that need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Real texts beside the project; tests that need them are skipped where there are none.
SHARED = ROOT.parent / "shared" / "data"
# What scripts of tests import from.
IMPORTED = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))


def printed(script: str, *options: str, devices: int = 0, **environment: str) -> list[str]:
    """What a script of the tests prints in a process of its own; `script` is a file of tests/support.

    It runs on so many devices of the CPU; without any it is for another compiler, to which it means nothing what the
    suite tells XLA for a CPU.
    """
    command = [sys.executable, Path(__file__).parent / script, *options]
    own = () if devices else ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "TRITON_INTERPRET")
    given = {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONPATH": IMPORTED}
    if devices:
        given["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(command, env=given | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
