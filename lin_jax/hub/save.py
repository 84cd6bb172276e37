"""Models to Hugging Face folders: `save_pretrained` writes a folder that is whole, or else is as it was."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.errors import UserError
from lin_jax.files import copy_without_mark
from lin_jax.hub.config_json import config_json, has_remote_code
from lin_jax.hub.conversion.streams import streams
from lin_jax.hub.conversion.tensor_file import StreamedTensor, write_file
from lin_jax.hub.export import write_remote_code
from lin_jax.hub.export.tokenizer_config import widen_tokenizer_config
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.files import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE, generation_ends
from lin_jax.hub.int8.matrices import output_axes
from lin_jax.hub.int8.streams import rounded_streams
from lin_jax.hub.medusa import save_heads
from lin_jax.hub.model_card import CARD_FILE, model_card
from lin_jax.hub.tensors import uncovered
from lin_jax.json_files import read_json, token_ids
from lin_jax.models import MedusaHeads, as_trained
from lin_jax.models.stored_weights import WeightStorage, restored

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
# A conversion that has begun, in a folder that was there before.
UNFINISHED = ".unfinished"
# Fields that a converted model keeps of its source's config.json; all others follow from the model.
_KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "id2label", "label2id")


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    heads: MedusaHeads | None = None,
    source: Mapping[str, Any] | None = None,
    base: str | None = None,
    figures: Mapping[str, Any] | None = None,
    end_tokens: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    note: Callable[[int], Any] = lambda size: None,
    weights: str = "stored",
) -> Path:
    """Writes a model as a Hugging Face folder; its files appear, whole, at the end.

    A model with softmax attention is written as transformers has it. A linearized one brings its own code, which
    transformers' automatic class for its kind opens: `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)`, or the one that the model card names. So does any model with int8 weights, which takes
    about a quarter of the bytes of float32.

    Args:
        model: of a family in `lin_jax.hub.families`.
        folder: the folder to write.
        tokenizer: the model's, or a folder with its files.
        heads: Medusa heads of the model.
        source: contents of the `config.json` that the model came with; names of labels and special tokens are kept.
        base: name of the model that it was made from, for the model card.
        figures: measured figures by name, for the model card.
        end_tokens: tokens that end a text; those that the source and the tokenizer name are added.
        max_shard_bytes: size of a file beyond which the tensors are split over several.
        overwrite: replace the content of the folder.
        note: called with the bytes of every tensor that was written.
        weights: stored keeps the type of the model's; int8 rounds the matrices of linear layers, the head and the table
            of tokens, symmetrically, with a float32 factor for each output or token, and learnt feature maps to
            bfloat16.

    Returns:
        The folder.

    Raises:
        UserError: the folder is not empty, or cannot be written; or the weights are unknown, or not for such a model.
    """
    int8 = WeightStorage(weights).weights == "int8"
    model = as_trained(restored(model))
    family = family_of_model(model)
    if left := uncovered(model, family.entries(model)):
        raise UserError(f"{', '.join(left)} of the model have no names in a checkpoint; export a model without them")
    folder = Path(folder)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        write_settings(model, partial, tokenizer=tokenizer, source=source, end_tokens=end_tokens, int8=int8)
        tensors = streams(model, family.entries(model), {})
        if int8:
            tensors = rounded_streams(tensors, output_axes(model, family.entries(model)), {})
        write_tensors(tensors, partial, max_shard_bytes=max_shard_bytes, note=note)
        if heads is not None:
            save_heads(heads, partial)
        card = model_card(model, name=folder.resolve().name, base=base, figures=figures, heads=heads, int8=int8)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def write_settings(
    model: Any,
    folder: Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    end_tokens: Sequence[int] = (),
    int8: bool = False,
) -> None:
    """Writes what a folder holds beside weights, heads and card: configurations, tokenizer, and code for PyTorch.

    Args:
        model: as in `save_pretrained`, like the others; it may be abstract.
        folder: the folder.
        tokenizer: as in `save_pretrained`.
        source: as in `save_pretrained`.
        end_tokens: as in `save_pretrained`.
        int8: whether its matrices are int8.

    Raises:
        UserError: the tokenizer's folder holds none, or a damaged file.
    """
    hf_config = config_json(model, int8=int8)
    hf_config |= {name: value for name, value in (source or {}).items() if name in _KEPT_FIELDS and value is not None}
    ids = _write_tokenizer(folder, tokenizer)
    widen_tokenizer_config(folder)
    if _is_causal(hf_config):
        hf_config = {name: value for name, value in ids.items() if value is not None} | hf_config
    _write_json(folder / CONFIG_FILE, hf_config)
    _write_generation_config(folder, hf_config, end_tokens, _tokenizer_ends(tokenizer))
    if has_remote_code(model, int8=int8):
        write_remote_code(folder, family_of_model(model).name)


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Checks that a folder is empty or may be overwritten, and that it can be written.

    Raises:
        UserError: it is not, it is a file, or it cannot.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder} is a link that leads nowhere; remove it, or give another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give the name of a folder")
    place = folder.absolute()
    if folder.is_dir():
        if _content(folder) and not overwrite:
            raise UserError(f"{folder} is not empty; give another folder, or --overwrite to replace what it holds")
    else:
        place = next(each for each in place.parents if each.exists())
    try:
        # Tried rather than asked: permissions say nothing of file systems that are read-only.
        os.rmdir(tempfile.mkdtemp(prefix=".lin_jax.", dir=place))
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}; give another folder") from error


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder, whose files replace those of the given one on success and are removed on failure.

    A folder that exists stays the one that it is: it may be a mount, a link, or where a shell is at work.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    check_output_folder(folder, overwrite=overwrite)
    folder = folder.absolute()
    exists = folder.is_dir()
    partial = (
        folder / f".{os.getpid()}.partial" if exists else folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    )
    try:
        partial.mkdir(parents=True)
        yield partial
        if exists:
            replace_content(folder, partial)
        else:
            os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {folder}: {reason}; give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _content(folder: Path) -> list[Path]:
    """Entries of a folder, without what every new file system of Linux has, and what was begun there."""
    return [path for path in folder.iterdir() if path.name not in ("lost+found", UNFINISHED)]


def replace_content(folder: Path, partial: Path) -> None:
    """Moves the files of a folder inside another to that one, in place of what it holds; all of them or none."""
    old = folder / f".{os.getpid()}.old"
    before = [path for path in _content(folder) if path != partial]
    # Last what readers look for first.
    after = sorted(partial.iterdir(), key=lambda path: path.name == CONFIG_FILE)
    moved: list[tuple[Path, Path]] = []
    try:
        old.mkdir()
        for path, to in [*((path, old) for path in before), *((path, folder) for path in after)]:
            os.replace(path, to / path.name)
            moved.append((path, to / path.name))
    except BaseException:
        for path, now in reversed(moved):
            os.replace(now, path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(
    tensors: Mapping[str, StreamedTensor],
    folder: Path,
    *,
    max_shard_bytes: int,
    note: Callable[[int], Any] = lambda size: None,
    write: Callable[..., Any] | None = None,
) -> None:
    """Writes tensors into files of at most some size, and their index; memory holds a block of one of them.

    Args:
        tensors: by name, in the order in which they are dealt to the files.
        folder: the folder.
        max_shard_bytes: size of a file beyond which the tensors are split over several.
        note: called with the bytes of every block that was written.
        write: writes one file, with the arguments of `write_file`, which is the default.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        (write or write_file)({name: tensors[name] for name in shard}, folder / file, note)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, StreamedTensor], most: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a tensor is never split."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | str | Path | None) -> dict[str, int | None]:
    """Writes a tokenizer's files, or copies them from a folder; returns its bos and eos ids, if it is at hand."""
    if tokenizer is None:
        return {}
    if not isinstance(tokenizer, Tokenizer):
        source = Path(tokenizer)
        generation_ends(source)  # What is damaged is named where it lies.
        for name in (*TOKENIZER_FILES, GENERATION_FILE):
            if (source / name).is_file():
                copy_without_mark(source / name, folder / name)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{source} holds no tokenizer; give the folder of one")
        return {}
    tokenizer.save(folder)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _tokenizer_ends(tokenizer: Tokenizer | str | Path | None) -> list[int]:
    """The end token of a tokenizer; none where its files are copied and cannot be opened here."""
    if isinstance(tokenizer, str | Path):
        with suppress(UserError):
            return _tokenizer_ends(load_tokenizer(tokenizer))
        return []
    return [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]


def _write_generation_config(
    folder: Path, hf_config: Mapping[str, Any], given: Sequence[int], of_tokenizer: Sequence[int]
) -> None:
    """Writes what texts begin and end with; a text ends at whatever any file of the folder names as its end."""
    if not _is_causal(hf_config):
        return
    path = folder / GENERATION_FILE
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    content = {name: hf_config[name] for name in names if hf_config.get(name) is not None}
    if path.exists():
        content = read_json(path)
    said = [token for each in (content, hf_config) for token in token_ids(each, "eos_token_id", str(path))]
    ends = list(dict.fromkeys([*given, *said, *of_tokenizer]))
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    _write_json(path, content)


def _is_causal(hf_config: Mapping[str, Any]) -> bool:
    return any(
        name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for name in hf_config["architectures"]
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
