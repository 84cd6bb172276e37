"""File format of cached tokens: one flat file that is mapped into memory.

A header (`_HEADER`: a name, bytes a token, numbers of tokens and pieces, and a digest of everything but the header),
then all tokens, concatenated, then int64 `[pieces + 1]` where each begins and the last one ends. Little-endian.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<16sQQQ16s")
_NAME = b"lin_jax tokens 1"
_TYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<i4")}
_OFFSET = np.dtype("<i8")


class DamagedError(Exception):
    """Raised for a file of tokens that is not as it was written; the message is the reason."""


def write_tokens(path: Path, pieces: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes pieces of tokens, each `[N]`, as they come; the header last, so that half a file is never valid.

    Raises:
        OSError: it cannot be written.
    """
    digest, ends = hashlib.blake2b(digest_size=16), [0]
    with path.open("wb") as file:
        file.write(bytes(_HEADER.size))
        for piece in pieces:
            data = piece.astype(dtype).tobytes()
            digest.update(data)
            file.write(data)
            ends.append(ends[-1] + len(piece))
        data = np.array(ends, _OFFSET).tobytes()
        digest.update(data)
        file.write(data)
        file.seek(0)
        file.write(_HEADER.pack(_NAME, dtype.itemsize, ends[-1], len(ends) - 1, digest.digest()))
        file.flush()
        os.fsync(file.fileno())


def read_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Maps a file into memory: its tokens `[N]`, and int64 `[pieces + 1]` where pieces begin and end.

    All of it is read once, to make sure that nothing is missing or changed.

    Raises:
        DamagedError: it is not as it was written.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size < _HEADER.size:
        raise DamagedError(f"it has {size} bytes, less than a header")
    mapped: np.ndarray = np.memmap(path, np.uint8, mode="r")
    name, width, count, pieces, digest = _HEADER.unpack(mapped[: _HEADER.size].tobytes())
    if name != _NAME or width not in _TYPES:
        raise DamagedError("it does not begin as a file of tokens does")
    middle = _HEADER.size + count * width
    expected = middle + (pieces + 1) * _OFFSET.itemsize
    if size != expected:
        raise DamagedError(f"it has {size} bytes instead of {expected}")
    if hashlib.blake2b(mapped.data[_HEADER.size :], digest_size=16).digest() != digest:
        raise DamagedError("its content has changed")
    return mapped[_HEADER.size : middle].view(_TYPES[width]), mapped[middle:].view(_OFFSET).copy()
