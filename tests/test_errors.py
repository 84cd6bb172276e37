"""Ends of scripts: a line for what a user can mend, silence for a closed pipe, and seeds that are none."""

import os
import subprocess
import sys

import pytest
from support.processes import ROOT

from lin_jax.errors import UserError, check_seed


def ended(body: str, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script's `main` of these lines in a shell."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    script = f"from lin_jax.errors import UserError, exit_cleanly\ndef main():\n{lines}exit_cleanly(main)\n"
    command = shell.format(f'{sys.executable} -c "$SCRIPT"')
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | {"SCRIPT": script, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "reader"),
    [
        ("print('a')", "true"),
        ("for _ in range(100_000): print('a')", "head -c 50"),
        ("import argparse; argparse.ArgumentParser().parse_args(['--help'])", "true"),
        ("import time, sys; time.sleep(0.3); print('a', flush=True); print('b')", "true"),
    ],
)
def test_a_closed_pipe_is_silent(body: str, reader: str) -> None:
    done = ended(body, "{} | " + reader)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
    both = ended("import sys, time; time.sleep(0.3); print('a', file=sys.stderr); return 2", "{} 2>&1 | true")
    assert both.stderr == ""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise UserError('give another')", 2, "error: give another\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("return 3", 3, ""),
        ("return None", 0, ""),
        ("raise SystemExit(4)", 4, ""),
        ("import logging; logging.getLogger('lin_jax.data').warning('it was cut')", 0, "WARNING: it was cut\n"),
    ],
)
def test_statuses(body: str, code: int, said: str) -> None:
    done = ended(body)
    assert (done.returncode, done.stderr) == (code, said)


def test_output_is_possible_everywhere() -> None:
    assert ended("print('a')", "{} >&-").returncode == 0
    full = ended("print('a')", "{} > /dev/full")
    assert (full.returncode, full.stderr) == (2, "error: cannot write the output: No space left on device\n")
    narrow = ended("print('日')", PYTHONIOENCODING="ascii")
    assert (narrow.returncode, narrow.stdout) == (0, "\\u65e5\n")


@pytest.mark.parametrize("seed", [-1, 2**32, 1_790_000_000_000_000_000, 10**20])
def test_seeds_that_are_none(seed: int) -> None:
    with pytest.raises(UserError, match=rf"--seed is {seed}; give a number from 0 to 4294967295"):
        check_seed(seed, "--seed")
    check_seed(2**32 - 1)
