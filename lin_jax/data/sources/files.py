"""Files of a source: found below a folder, where links are followed once, and unpacked by the ends of their names."""

import bz2
import gzip
import io
import logging
import lzma
import os
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from lin_jax.extras import require

log = logging.getLogger(__name__)

_BINARY_PROBE = 8192


def _open_zstandard(path: Path) -> IO[bytes]:
    # Arrow's reader, unlike others, goes on behind the first frame, and notices a file that is cut off.
    pyarrow = require("pyarrow", "reading .zst files")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


# Readers by the ends of names, in any case.
PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstandard,
}
# Failures of a file that cannot be opened or unpacked, or is no text.
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)


def suffix_inside(path: Path) -> str:
    """Returns the end of a file's name in lower case, that of a compression left away."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def open_file(path: Path) -> IO[bytes]:
    """Opens a file's bytes, unpacked.

    Raises:
        OSError, EOFError, lzma.LZMAError, zlib.error: it cannot be read or unpacked; also later, while it is read.
    """
    unpack = PACKED.get(path.suffix.lower())
    return cast(IO[bytes], path.open("rb") if unpack is None else unpack(path))


def read_text(path: Path) -> str:
    """Reads a text file, unpacked, without the byte-order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8, or has a zero byte near its start, as only binary files do.
        OSError, EOFError, lzma.LZMAError, zlib.error: it cannot be read or unpacked.
    """
    with open_file(path) as file:
        data = file.read(_BINARY_PROBE)
        # Looked at first, so that a large binary file is not read whole just to be left out.
        if b"\0" in data:
            raise UnicodeDecodeError("utf-8", data, data.index(0), data.index(0) + 1, "zero byte")
        data += file.read()
    return data.decode("utf-8-sig")


def list_files(root: Path) -> list[Path]:
    """Lists the files below a folder, sorted, without hidden ones and byte code; a file lists itself.

    Linked folders are followed once each; one warning counts each kind of thing that is left out.
    """
    if not root.is_dir():
        return [root]
    walk = _Walk()
    walk.enter(root)
    for kind, paths in sorted(walk.left_out.items()):
        log.warning("%s: left out %d %s, %s first", root, len(paths), kind, min(paths).relative_to(root))
    return sorted(walk.files)


class _Walk:
    """Files found below a folder, and what is left out by kind."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.left_out: defaultdict[str, list[Path]] = defaultdict(list)
        self._entered: set[tuple[int, int]] = set()

    def enter(self, root: Path) -> None:
        """Walks through a folder, and only then through links, so that a file has its own name rather than a link's."""
        self._look_into(root)
        links = self._below(root)
        while links:
            further = [found for link in sorted(links) if self._look_into(link) for found in self._below(link)]
            links = further

    def _look_into(self, folder: Path) -> bool:
        """Notes that a folder is read; False if it was read already."""
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in self._entered:
            self.left_out["linked folders that are read already"].append(folder)
            return False
        self._entered.add(identity)
        return True

    def _below(self, folder: Path) -> list[Path]:
        """Collects the files below a folder; returns the links to folders there."""
        links, folders = [], [folder]
        while folders:
            for path in self._visible(folders.pop()):
                if path.is_symlink() and path.is_dir():
                    links.append(path)
                elif path.is_dir():
                    if self._look_into(path):
                        folders.append(path)
                elif path.is_file():
                    self.files.append(path)
                else:
                    kind = "links that lead nowhere" if path.is_symlink() else "sockets, pipes and devices"
                    self.left_out[kind].append(path)
        return links

    def _visible(self, folder: Path) -> list[Path]:
        try:
            names = os.listdir(folder)
        except OSError:
            self.left_out["folders that cannot be opened"].append(folder)
            return []
        return [folder / name for name in names if not name.startswith(".") and name != "__pycache__"]
