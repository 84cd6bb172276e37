"""Options and fixtures of the whole suite."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=HERE / "golden",
        metavar="DIR",
        help="folder of golden files to check against (default: tests/golden)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = sorted(metafunc.config.getoption("golden").glob("*.safetensors"))
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


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
