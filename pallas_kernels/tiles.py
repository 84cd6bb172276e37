"""Tile sizes of kernels: a small table for each kind of device, kernel, size of heads and type.

`tiles.json` is shipped; `python -m pallas_kernels.tune` measures better entries for the device at hand. `use_table`
puts another file in its place.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

TABLE = Path(__file__).with_name("tiles.json")
# Entries of devices that have none of their own.
COMMON = "any"
SIZES = (32, 64, 128, 256)
_table: ContextVar[dict[str, Any] | None] = ContextVar("table", default=None)
# The file that all threads read, where no `using` says otherwise.
_files = [TABLE]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one GPU kernel.

    Attributes:
        rows: of a tile.
        part: columns of values that a program has.
        piece: columns that products with the memory take at a time.
        warps: of a program.
        stages: of software pipelines.
    """

    rows: int
    part: int
    piece: int
    warps: int
    stages: int


def next_power(number: int) -> int:
    """The next power of two, at least 16: the sizes that Triton's products take."""
    return max(16, 1 << (number - 1).bit_length()) if number > 0 else 16


def tile_bucket(key_size: int, value_size: int, dtype: Any) -> str:
    """The name of a row of the table: the larger size, rounded up, and the type; ` placed` may follow."""
    size = next((each for each in SIZES if each >= max(key_size, value_size)), SIZES[-1])
    return f"{size} {jnp.dtype(dtype).name}"


def tiles_for(
    kernel: str, key_size: int, value_size: int, dtype: Any, *, placed: bool = False, device: str | None = None
) -> Tiles:
    """The tiles of a kernel for heads of some size.

    Args:
        kernel: `operation.kernel`.
        key_size: of a head's queries and keys.
        value_size: of its values.
        dtype: of all three.
        placed: whether rows hold several documents, for which kernels need more registers.
        device: a kind of device; None for the one at hand.
    """
    row = tile_bucket(key_size, value_size, dtype)
    tiles = Tiles(**_entry(kernel, [f"{row} placed", row] if placed else [row], device))
    widest = next_power(value_size)
    piece = min(tiles.piece, next_power(key_size), widest)
    return dataclasses.replace(tiles, part=min(tiles.part, widest), piece=piece)


def block_rows(operation: str, key_size: int, value_size: int, dtype: Any, device: str | None = None) -> int:
    """Rows of a block: so many that its memory, which is kept for the backward pass, weighs little beside them."""
    rows: int = _entry(f"{operation}.block", [tile_bucket(key_size, value_size, dtype)], device)["rows"]
    return rows


def _entry(kernel: str, names: Sequence[str], device: str | None) -> dict[str, int]:
    """The first of some rows that the device has, or all devices have."""
    table = _table.get() or load_table()
    entries = [table.get(each, {}).get(kernel, {}) for each in (device or jax.devices()[0].device_kind, COMMON)]
    return next(rows[name] for rows in entries for name in names if name in rows)


def untiled(kernel: str, key_size: int, value_size: int, dtype: Any) -> str | None:
    """The reason why a kernel has no tiles for heads of some size: too few registers; None if it has."""
    table = _table.get() or load_table()
    row = tile_bucket(key_size, value_size, dtype)
    if max(key_size, value_size) > SIZES[-1] or row not in table[COMMON][kernel]:
        return f"heads of {key_size} and {value_size} in {jnp.dtype(dtype).name} are too large for it"
    return None


@contextlib.contextmanager
def using(table: dict[str, Any]) -> Iterator[None]:
    """Replaces the shipped table for programs that are traced meanwhile."""
    token = _table.set(table)
    try:
        yield
    finally:
        _table.reset(token)


def use_table(file: Path) -> None:
    """Reads another table than the shipped one from here on, in all threads; what has been traced keeps its own."""
    _files[:] = [file]


def load_table() -> dict[str, Any]:
    """The table: device, kernel, bucket, tiles."""
    return _read(_files[0])


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(file.read_text())
    return table
