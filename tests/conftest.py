"""Options and fixtures of the whole suite."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import pytest
from safetensors import safe_open

from pallas_kernels.implementations import preferring

HERE = Path(__file__).parent

# Most of the time of a small model's test is compilation. Scripts that tests start inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# Triton learns whether it interprets when it is imported, which PyTorch may do.
if jax.default_backend() != "gpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=HERE / "golden",
        metavar="DIR",
        help="folder of golden files to check against (default: tests/golden)",
    )
    parser.addoption(
        "--implementation",
        metavar="NAME",
        help="what computes attention where a test asks for nothing: tpu_interpreted, gpu_interpreted, gpu or tpu",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        holds, family = (metafunc.definition.get_closest_marker(name) for name in ("holds", "family"))
        files = sorted(metafunc.config.getoption("golden").glob("*.safetensors"))
        files = [file for file in files if holds is None or _holds(file, holds.args[0])]
        files = [file for file in files if family is None or file.stem.split("-")[0] in family.args]
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


def _holds(file: Path, pattern: str) -> bool:
    """Whether a golden file has an array whose name matches."""
    with safe_open(file, "np") as opened:
        return any(re.match(pattern, key) for key in opened.keys())  # noqa: SIM118 - the handle is no mapping


def pytest_collection_finish() -> None:
    """What importing left is not looked through again whenever tracing makes garbage."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Frees compiled programs: a process can map 65,530 pieces of memory, and XLA crashes beyond."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels in place of XLA in whatever a test runs in float32 or bfloat16."""
    name = request.config.getoption("--implementation")
    with preferring(name) if name else nullcontext():
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts beside the project; tests that need it are skipped where there is none."""
    folder = HERE.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project")
    return folder
