"""The benchmarks run, check themselves, and write what they promise."""

import json
import subprocess
import sys
from pathlib import Path

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
