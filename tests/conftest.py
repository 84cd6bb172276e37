"""Options and fixtures of the whole suite."""

import gc
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors import safe_open
from support.cells import some_of
from support.compilation import compile_quickly, compiling_as_users
from support.processes import SHARED

from lin_jax.attention import AttentionConfig
from lin_jax.models import LlamaConfig
from pallas_kernels.implementations import preferring

HERE = Path(__file__).parent
# Files of few tests that take a long time, most of it in one of them, in descending order.
LONGEST = (
    *("training/test_resume", "demo/test_demo", "decoding/test_lossless", "test_notebook", "cli/test_decode"),
    *("pallas_kernels/test_compilation", "test_project", "test_api", "attention/test_sequence_parallel"),
    *("decoding/test_same_bits", "training/distributed/test_on_meshes", "cli/test_report", "cli/test_self_generate"),
    *("training/checkpoint/test_shared_checkpoints", "training/test_openings", "pallas_kernels/test_on_a_mesh"),
    *("decoding/engine/test_prefix_cache", "losses/test_chunked", "models/test_separate_layers", "test_session"),
)


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
    parser.addoption(
        "--users-settings",
        action="store_true",
        help="compile everything as users do, with XLA's optimizations, which take most of the time of small tests",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Chooses how programs are compiled, before the first one is; scripts that tests start inherit it."""
    # What tests measure is of no use to anybody, and nobody's measurements decide what tests do.
    os.environ["LIN_JAX_CACHE"] = "off"
    if not config.getoption("--users-settings"):
        compile_quickly()
    # Triton learns whether it interprets when it is imported, which PyTorch may do.
    if jax.default_backend() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        holds, family, always = (metafunc.definition.get_closest_marker(name) for name in ("holds", "family", "always"))
        files = sorted(metafunc.config.getoption("golden").glob("*.safetensors"))
        files = [file for file in files if holds is None or _holds(file, holds.args[0])]
        files = [file for file in files if family is None or file.stem.split("-")[0] in family.args]
        named = files if always is None else [file for file in files if file.stem in always.args]
        metafunc.parametrize("golden_file", some_of(files, named), ids=lambda file: file.stem)


def _holds(file: Path, pattern: str) -> bool:
    """Whether a golden file has an array whose name matches."""
    with safe_open(file, "np") as opened:
        return any(re.match(pattern, key) for key in opened.keys())  # noqa: SIM118 - the handle is no mapping


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Leaves the mark `users_settings` to the cells that it names; what is left to run is put in order.

    Workers take files in this order: the longest first, then those of many tests, so that all workers end together.
    """
    for item in items:
        mark = item.get_closest_marker("users_settings")
        if mark is not None and mark.args and not any(f"[{name}]" in item.name for name in mark.args):
            item.own_markers.remove(mark)
    yield
    rank = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    count = Counter(_file_of(item) for item in items)
    items.sort(key=lambda item: (rank.get(_file_of(item), len(rank)), -count[_file_of(item)], _file_of(item)))


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def pytest_collection_finish() -> None:
    """What importing left is not looked through again whenever tracing makes garbage, nor garbage as often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def programs_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles a program once, for all tests, workers and processes of their own."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    options = {
        "jax_compilation_cache_dir": str(folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Frees compiled programs: a process can map 65,530 pieces of memory, and XLA crashes beyond."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def users_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles what is marked so as users do, where the other tests are not."""
    marked = request.node.get_closest_marker("users_settings") is not None
    with compiling_as_users() if marked and not request.config.getoption("--users-settings") else nullcontext():
        yield


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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, predictable text: sentences over few words, many documents."""
    chance = random.Random(0)
    words = "the a small big cat dog tree house sat ran under over near and then it".split()  # noqa: SIM905
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    documents = [" ".join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(400)]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def tiny_model() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        attention=AttentionConfig(group_size=8, kernel_size=7, initial_alpha=0.1),
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts beside the project; tests that need it are skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside the project")
    return SHARED
