"""Safetensors files that are written tensor by tensor, byte for byte as the library writes them at once."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Types by their names in a file, in the library's order: it writes those of the widest numbers first.
_NAMES = {
    np.dtype(np.int8): "I8",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}
_ORDER = list(_NAMES)


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is yet to be made.

    Attributes:
        shape: sizes of its axes.
        dtype: type of its numbers.
        blocks: makes its numbers, as C-contiguous arrays that follow each other in memory's order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    tensors: Mapping[str, StreamedTensor], path: Path, note: Callable[[int], Any] = lambda size: None
) -> str:
    """Writes a safetensors file in PyTorch's format; memory holds one block of one tensor.

    Args:
        tensors: by name.
        path: of the file, which has the permissions of any new one.
        note: called with the bytes of every block that was written.

    Returns:
        The SHA-256 of the file, in hexadecimal digits.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(names, tensors)
        digest.update(header)
        file.write(header)
        for name in names:
            written = 0
            for block in tensors[name].blocks():
                # bfloat16 has no buffer of its own; bytes do.
                content = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                digest.update(content)
                file.write(content)
                written += len(content)
                note(len(content))
            assert written == tensors[name].nbytes, f"{name} has {tensors[name].nbytes} bytes, and {written} came"
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(names: Iterable[str], tensors: Mapping[str, StreamedTensor]) -> bytes:
    """The length of the table of contents, and the table, filled up so that numbers begin at multiples of eight."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        tensor = tensors[name]
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    table = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table
