"""What all benchmarks say about where and with what they ran, and how they write it down."""

import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import lin_jax
from lin_jax.devices import device_kind


def header(name: str) -> dict[str, Any]:
    """How a benchmark's report begins: its name, the device, the versions, and the commit."""
    return {
        "benchmark": name,
        "device": device_kind(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "lin_jax": lin_jax.__version__,
        "commit": commit(),
    }


def write(report: Mapping[str, Any], file: str | Path) -> None:
    """Writes a report as JSON to a file, or prints it if the file is "-"."""
    text = json.dumps(report, indent=1)
    print(text) if str(file) == "-" else Path(file).write_text(text + "\n")


def commit() -> str | None:
    """The commit that is checked out, if this is a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
