"""Scripts of tests that need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed(script: str, *options: str, **environment: str) -> list[str]:
    """What a script of the tests prints in a process of its own; `script` is a path from their folder."""
    command = [sys.executable, Path(__file__).parent / script, *options]
    # What the suite tells XLA for a CPU means nothing to other compilers.
    own = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
