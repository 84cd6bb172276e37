"""The benchmarks run, check themselves, and write what they promise."""

import json
import subprocess
import sys
from pathlib import Path

from lin_jax.attention import REGISTRY

ROOT = Path(__file__).parent.parent


def test_decode_speed(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    options = ("--contexts", "16", "300", "--tokens", "4", "--rounds", "1", "--json", str(file))
    done = subprocess.run(
        [sys.executable, "benchmarks/decode_speed.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    assert len({result["state_bytes"] for result in report["results"]}) == 1


def test_support_matrix(tmp_path: Path) -> None:
    """One cell is tried, and the README's table has every attention, with nothing that failed."""
    file = tmp_path / "matrix.json"
    options = ("--models", "bert", "--attentions", "relu", "--json", str(file))
    done = subprocess.run(
        [sys.executable, "benchmarks/support_matrix.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text()) == {"relu": {"bert": {"T": True, "E": True, "X": True}}}
    assert "| `relu` | TEX |" in done.stdout
    table = (ROOT / "README.md").read_text().split("<!-- support matrix -->")[1]
    assert "(" not in table
    assert all(f"| `{name}` |" in table for name in REGISTRY)
