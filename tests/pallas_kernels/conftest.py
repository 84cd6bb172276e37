"""What all tests of kernels share."""

from collections.abc import Iterator

import pytest

from pallas_kernels.tiles import load_table, using


@pytest.fixture(autouse=True)
def coarse_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter takes its time for each program, whatever its size: fewer, larger ones, where it is slow."""
    if "gpu_interpreted" not in request.node.name:
        yield
        return
    table = {
        device: {kernel: {row: entry | {"rows": 64} for row, entry in rows.items()} for kernel, rows in kernels.items()}
        for device, kernels in load_table().items()
    }
    with using(table):
        yield
