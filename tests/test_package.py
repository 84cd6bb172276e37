"""The package: what is in it, what it needs, and what it asks for when that is not there."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.processes import ROOT

from lin_jax.errors import UserError
from lin_jax.extras import EXTRAS, require
from lin_jax.training.config_file import load_run_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of every kind of file that is no module: one that the package would not work without.
BESIDE_MODULES = (
    "lin_jax/py.typed",
    "pallas_kernels/py.typed",
    "pallas_kernels/tiles.json",
    "lin_jax/demo/report.html.j2",
    "lin_jax/configs/tiny.yaml",
    "lin_jax/hub/export/torch_source/causal_lm_lin_jax.py",
)


def names_of(requirements: list[str]) -> set[str]:
    """Names as modules have them: a package's own may have hyphens."""
    return {requirement.partition(">")[0].partition("[")[0].replace("-", "_") for requirement in requirements}


def test_an_extra_brings_what_is_asked_for() -> None:
    for package, extra in EXTRAS.items():
        assert package in names_of(PROJECT["optional-dependencies"][extra])
        assert package not in names_of(PROJECT["dependencies"])


def test_a_package_that_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"^training needs the package grain, .* pip install 'lin-jax\[train\]'$"):
        require("grain", "training")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"^pictures needs the package matplotlib, .* pip install 'lin-jax\[plot\]'$"):
        require("matplotlib.figure", "pictures")


def test_the_core_does_without_extras(tmp_path: Path) -> None:
    """Loading, decoding and exporting import none of their packages; training asks for the first one in a line."""
    (tmp_path / "text.txt").write_text("one two three " * 500)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))
import lin_jax
assert "jax" not in sys.modules, "import lin_jax waits for JAX"
import lin_jax.api, lin_jax.cli.decode.command, lin_jax.cli.hub.commands, lin_jax.cli.evaluate, lin_jax.cli.train
from lin_jax.data import DataConfig, Document, Tokenizer, training_batches
from lin_jax.errors import UserError
tokenizer = Tokenizer.train(["a b c"], 257)
try:
    training_batches([Document("a", "a b c")], tokenizer, DataConfig(), batch_size=1, seed=0)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "reading text for training needs the package grain, which is not installed; "
        "install it with: pip install 'lin-jax[train]'\n"
    )


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run_config("configs/tiny.yaml").output == "runs/tiny"
    with pytest.raises(UserError, match=r"^cannot read configs/none.yaml: "):
        load_run_config("configs/none.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("output: runs/own\n")
    assert load_run_config("configs/tiny.yaml").output == "runs/own"


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.mark.thorough
def test_the_wheel_holds_all_that_works_without_a_working_copy(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "lin-jax = lin_jax.cli.main:run" in wheel.read(entry_points).decode()
    modules = {
        path.relative_to(ROOT).as_posix()
        for name in ("lin_jax", "pallas_kernels")
        for path in (ROOT / name).rglob("*.py")
    }
    recipes = {f"lin_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").iterdir()}
    assert modules | recipes | set(BESIDE_MODULES) <= names
    assert {name.partition("/")[0] for name in names} == {
        "lin_jax",
        "pallas_kernels",
        f"lin_jax-{PROJECT['version']}.dist-info",
    }


@pytest.mark.thorough
def test_the_source_distribution_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "configs/tiny.yaml",
        "mkdocs.yml",
        "tests/test_package.py",
    } <= names
    assert {name for name in BESIDE_MODULES if "configs" not in name} <= names
