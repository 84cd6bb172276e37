"""The table of tiles: what is shipped fits every problem; `tune` writes what the device at hand likes better."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from support.backends import INTERPRETED, KERNELS

from pallas_kernels import tune
from pallas_kernels.tiles import (
    COMMON,
    SIZES,
    TABLE,
    Tiles,
    block_rows,
    load_table,
    next_power,
    tile_bucket,
    tiles_for,
    untiled,
    use_table,
    using,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1, 16, 48, *SIZES])
def test_what_is_shipped(size, dtype):
    for kernel in load_table()[COMMON]:
        operation, _, part = kernel.partition(".")
        if part == "block":
            # Blocks are whole tiles, on TPU of 128 rows.
            assert block_rows(operation, size, size, dtype, device="none of ours") % 128 == 0
            continue
        if untiled(kernel, size, size, dtype) is not None:
            assert (size, dtype) == (256, "float32")
            continue
        for placed in (False, True):
            tiles = tiles_for(kernel, size, size, dtype, placed=placed, device="none of ours")
            # Tiles divide blocks, parts and pieces the padded sizes of heads.
            assert 256 % tiles.rows == 0 == next_power(size) % tiles.part == next_power(size) % tiles.piece
            assert tiles.rows >= 16


def test_tuning_writes_a_line_for_each_row():
    assert tune.table_text(load_table()) == TABLE.read_text()


def test_a_device_has_its_own():
    mine = {"rows": 16, "part": 16, "piece": 16, "warps": 8, "stages": 3}
    table = {**load_table(), "toaster": {"tree_verify": {tile_bucket(64, 64, "bfloat16"): mine}}}
    with using(table):
        assert tiles_for("tree_verify", 64, 64, "bfloat16", device="toaster") == Tiles(**mine)
        assert tiles_for("tree_verify", 64, 64, "float32", device="toaster") != Tiles(**mine)
        assert tiles_for("tree_verify", 64, 64, "bfloat16", device="kettle") != Tiles(**mine)


def test_another_table_for_all_threads(tmp_path, monkeypatch):
    """Benchmarks compile in threads; a table that is put in place for a while goes before it."""
    monkeypatch.setattr("pallas_kernels.tiles._files", [TABLE])
    mine = {"rows": 16, "part": 16, "piece": 16, "warps": 8, "stages": 3}
    bucket = tile_bucket(64, 64, "bfloat16")
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({**load_table(), "toaster": {"tree_verify": {bucket: mine}}}))

    def found(_=None):
        return tiles_for("tree_verify", 64, 64, "bfloat16", device="toaster")

    shipped = found()
    use_table(table)
    with ThreadPoolExecutor(1) as pool:
        assert [found(), *pool.map(found, range(1))] == [Tiles(**mine)] * 2
    with using(json.loads(TABLE.read_text())):
        assert found() == shipped != Tiles(**mine)


@pytest.mark.skipif(KERNELS != INTERPRETED, reason="interprets Triton")
@pytest.mark.thorough
def test_tuning(tmp_path, monkeypatch, capsys):
    table = tmp_path / "tiles.json"
    shutil.copy(TABLE, table)
    sizes = ["--batch", "1", "--heads", "1", "--tokens", "20", "--sizes", "32", "--dtypes", "float32"]
    monkeypatch.setattr(
        "sys.argv",
        [
            "tune",
            *("--implementation", "gpu_interpreted", "--operations", "path_commit", "--candidates", "2"),
            *(*sizes, "--seconds", "0.001", "--table", str(table)),
        ],
    )
    assert tune.main() == 0
    written = json.loads(table.read_text())
    device = jax.devices()[0].device_kind
    assert written[COMMON] == load_table()[COMMON]
    assert list(written[device]) == ["path_commit"]
    assert Tiles(**written[device]["path_commit"]["32 float32"]).rows >= 16
    assert "1 rows for" in capsys.readouterr().out
