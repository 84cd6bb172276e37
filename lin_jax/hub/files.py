"""Checkpoint folders of safetensors, local or from the Hub, in one file or in shards, read tensor by tensor."""

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lin_jax.data.sources.remote import HUB_PREFIX, MODEL, fetch_file, fetch_repository, is_remote_file
from lin_jax.errors import UserError
from lin_jax.json_files import read_json, short, token_ids, without_nulls

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LLAMA2C_SUFFIX = ".bin"
# Files that are downloaded from the Hub: never pickled weights, never code.
WANTED = ("*.safetensors", "*.json", "tokenizer.model", "spiece.model", "vocab.bpe", "*.txt", "*.jinja")
# Of those, not: the same weights in the layout of their makers or in another type, and what lies in folders inside.
UNWANTED = ("consolidated*", "*/*", "*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class FilePages:
    """A safetensors file, which was opened without complaint, in memory's pages; made when they are first used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def begins(self) -> dict[str, int]:
        """First byte of every tensor."""
        length = int.from_bytes(self.mapping[:8], "little")
        header = json.loads(self.mapping[8 : 8 + length])
        return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The whole file."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; `np.asarray` reads it.

    Attributes:
        name: in the file.
        shape: sizes of its axes.
        dtype: type of its numbers.
        file: the open file.
        pages: of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Any = field(repr=False)
    pages: "FilePages" = field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        array = self.file.get_tensor(self.name)
        return array if dtype is None else array.astype(dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def mapped(self) -> np.ndarray:
        """The tensor in the pages of the file: nothing is copied, and what is not used is not read."""
        if not self.nbytes:
            return np.asarray(self)
        return np.ndarray(self.shape, self.dtype, buffer=self.pages.mapping, offset=self.pages.begins[self.name])

    def release(self) -> None:
        """Lets go of the pages of `mapped`, which are read again if they are used."""
        begin = self.pages.begins[self.name]
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (begin + self.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.mapping.madvise(mmap.MADV_DONTNEED, first, length)


Tensors = dict[str, LazyTensor]


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The local folder of a path or of a name on the Hub, which is downloaded: safetensors and settings only.

    Args:
        name_or_path: a folder, or `owner/name` or `hub:owner/name` of a repository on the Hub; or a file of llama2.c,
            `hub:owner/name/file.bin` or `https://host/file.bin`, whose local copy is returned.

    Raises:
        UserError: there is neither such a folder nor such a repository, or it cannot be fetched.
    """
    name = str(name_or_path)
    if is_remote_file(name):
        if not name.endswith(LLAMA2C_SUFFIX):
            raise UserError(f"{name} is no file of llama2.c ({LLAMA2C_SUFFIX}); give one, or hub:OWNER/NAME")
        return fetch_file(name, MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder of a checkpoint")
    if not _ID.fullmatch(name.removeprefix(HUB_PREFIX)):
        raise UserError(f"there is no folder {path}; give the folder of a checkpoint, or OWNER/NAME on the Hub")
    try:
        return fetch_repository(name, "a folder with its files", WANTED, UNWANTED)
    except UserError:
        raise
    except Exception as error:  # the network and the Hub raise dozens of kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(". ")
        raise UserError(
            f"there is no folder {name}, and it cannot be fetched from the Hub: {reason}; check the name"
        ) from error


def is_checkpoint_folder(folder: Path) -> bool:
    """True if a folder holds a Hugging Face checkpoint."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's `config.json`, without nulls.

    Raises:
        UserError: there is no such file, it is damaged, or an end token in it is none.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}; give the folder of a Hugging Face checkpoint")
    content = without_nulls(read_json(path))
    for name in ("bos_token_id", "eos_token_id"):
        token_ids(content, name, str(path))
    return content


def generation_ends(folder: Path) -> tuple[int, ...]:
    """The end tokens in a folder's `generation_config.json`; empty without them or without the file.

    Raises:
        UserError: the file is damaged, or an end token in it is none.
    """
    path = folder / GENERATION_FILE
    return token_ids(read_json(path), "eos_token_id", str(path)) if path.is_file() else ()


def read_checkpoint(folder: Path) -> Tensors:
    """Opens every tensor of a checkpoint folder, by name; none of them is read yet.

    A single file comes before an index, which may be an older one's, as in transformers; see `unread_index`.

    Raises:
        UserError: there is no safetensors file, a shard is missing, damaged or outside the folder, or two shards hold
            the same tensor.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_symlink() and not single.exists():
        raise UserError(f"{single} is a link to {os.readlink(single)}, which is not there; copy the file itself")
    if single.is_file() and not _is_shard(folder):
        return read_tensors([single])
    if index.is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle, which can run code and is never read; "
            "convert it with transformers: from_pretrained, then save_pretrained"
        )
    raise UserError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}; give the folder of a checkpoint")


def unread_index(folder: Path) -> str | None:
    """A line about an index that was not read, since a single file lies beside it; None without one."""
    if not (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file() or _is_shard(folder):
        return None
    return f"{folder} holds {SINGLE_FILE} and {INDEX_FILE} of other files: the former was read; remove one of them"


def _is_shard(folder: Path) -> bool:
    """True if the index names the single file as one of its shards."""
    try:
        return (folder / INDEX_FILE).is_file() and SINGLE_FILE in _weight_map(folder).values()
    except UserError:
        return False  # A damaged index is not needed beside the single file.


def read_tensors(paths: Sequence[Path]) -> Tensors:
    """Opens every tensor of some safetensors files, by name; none of them is read yet.

    Raises:
        UserError: a file is missing, truncated or not a safetensors file, or two files hold the same tensor.
    """
    tensors: Tensors = {}
    origin: dict[str, Path] = {}
    for path in paths:
        for tensor in _open(path):
            if tensor.name in tensors:
                raise UserError(
                    f"{tensor.name} is in {origin[tensor.name].name} and in {path.name} of {path.parent}; "
                    "keep one of them"
                )
            tensors[tensor.name], origin[tensor.name] = tensor, path
    return tensors


def write_file(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file in PyTorch's format, with the permissions of any new file."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())


def listed(names: Sequence[str], most: int = 3) -> str:
    """Lists the first few names, and says how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(each if len(each) <= 120 else f"{each[:117]}..." for each in names[:most]) + more


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _weight_map(folder: Path) -> dict[str, str]:
    shards = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(shards, Mapping) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{folder / INDEX_FILE} has no weight_map of tensors to files; restore it")
    return dict(shards)


def _read_shards(folder: Path) -> Tensors:
    shards = _weight_map(folder)
    names = sorted(set(shards.values()))
    for name in names:
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / INDEX_FILE} names {short(name)}, which is outside the folder; restore it")
    # Unlike Path.is_file, this takes any name, also one too long for a file.
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise UserError(
            f"{folder} lacks {listed(missing)}, of the {len(names)} shards that {INDEX_FILE} names; copy them there"
        )
    tensors = read_tensors([folder / name for name in names])
    if absent := sorted(set(shards) - set(tensors)):
        raise UserError(
            f"{INDEX_FILE} names {absent[0]}, which {shards[absent[0]]} in {folder} does not hold; copy both again"
        )
    return tensors


def _open(path: Path) -> Iterator[LazyTensor]:
    if not path.is_file():
        raise UserError(f"there is no file {path}; copy it there")
    try:
        file = safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error
    pages = FilePages(path)
    for name in sorted(file.keys()):
        header = file.get_slice(name)
        dtype = header.get_dtype()
        if dtype not in _TYPES:
            raise UserError(
                f"{name} in {path} has dtype {dtype}, which is not supported; give one of {', '.join(_TYPES)}"
            )
        yield LazyTensor(name, tuple(header.get_shape()), np.dtype(_TYPES[dtype]), file, pages)
