"""The user's cache folder: programs of this kind of machine, kept where they may be and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from lin_jax.devices import machine_key
from lin_jax.user_cache import VARIABLE, cache_folder

SCRIPT = """
import jax
from lin_jax.user_cache import keep_programs
print(keep_programs())
jax.jit(lambda x: x + 1)(1.0)
"""


def call(**environment: str) -> str:
    known = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=known | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.strip()


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, " OFF ")
    assert cache_folder() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path / machine_key()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "lin_jax" / machine_key()


def test_programs_are_kept(tmp_path: Path) -> None:
    programs = Path(call(**{VARIABLE: str(tmp_path / "ours")}))
    assert programs == tmp_path / "ours" / machine_key() / "programs"
    assert any(programs.iterdir())
    (tmp_path / "file").write_text("")
    assert call(**{VARIABLE: str(tmp_path / "file")}) == "None"
    own = tmp_path / "own"
    assert call(**{VARIABLE: str(tmp_path / "not"), "JAX_COMPILATION_CACHE_DIR": str(own)}) == str(own)
    assert not (tmp_path / "not").exists()
