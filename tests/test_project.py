"""The project itself: style, types, and what the README says of it."""

import subprocess
import sys
import tomllib

import pytest
from support.processes import ROOT

import lin_jax


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
)
def test_lint(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lin_jax.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_core_needs_no_pytorch() -> None:
    """Training and decoding import neither PyTorch nor the tests' packages."""
    code = (
        "import sys; sys.modules.update({name: None for name in ('torch', 'pytest', 'hypothesis')});"
        "import lin_jax.session, lin_jax.training.run, lin_jax.hub.families.llama, lin_jax.cli.demo"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (word.strip("`,.;:()") for word in readme.split()):
        if path.startswith(("configs/", "benchmarks/", "lin_jax/", "pallas_kernels/")):
            assert (ROOT / path).exists(), path
