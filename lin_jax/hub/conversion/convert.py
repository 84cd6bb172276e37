"""A Hugging Face folder from an opened checkpoint, which is never in memory as a whole."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.config_json import config_json
from lin_jax.hub.conversion.streams import streams
from lin_jax.hub.conversion.tensor_file import StreamedTensor
from lin_jax.hub.conversion.unfinished import resumable_folder
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.files import LazyTensor
from lin_jax.hub.int8.matrices import output_axes
from lin_jax.hub.int8.streams import rounded_streams
from lin_jax.hub.int8.tensor import RoundedTensor
from lin_jax.hub.load import Pretrained
from lin_jax.hub.medusa import HEADS_FILE, entries, has_heads, note_heads, open_heads
from lin_jax.hub.model_card import CARD_FILE, model_card
from lin_jax.hub.peft import adapter_updates
from lin_jax.hub.save import write_settings, write_tensors
from lin_jax.hub.tensors import mismatches, summary
from lin_jax.models import MedusaHeads

# Types of a folder's matrices: as they are in the checkpoint, rounded, or what rounded ones stand for.
WEIGHTS = ("stored", "int8", "float")


def convert(
    opened: Pretrained,
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    base: str | None = None,
    figures: Mapping[str, Any] | None = None,
    end_tokens: Sequence[int] = (),
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    note: Callable[[int], Any] = lambda size: None,
    weights: str = "stored",
) -> Path:
    """Writes the folder that `save_pretrained` would write of a checkpoint's model, a block of numbers at a time.

    Memory holds a few blocks of a tensor, what another attention or head adds to the checkpoint, and the interpreter.
    Files appear at the end. An interrupted conversion keeps its finished files; the same call checks them and goes on.

    Args:
        opened: the checkpoint; use it for nothing else afterwards.
        folder: the folder to write.
        adapter: PEFT folder of LoRA adapters that are merged into the model.
        tokenizer: as in `save_pretrained`, like all that is not named here.
        base: as there.
        figures: as there.
        end_tokens: as there.
        seed: of the parameters that the attention or the head adds.
        max_shard_bytes: as there.
        overwrite: as there.
        note: called with the bytes of every block that was written.
        weights: stored writes matrices as they are in the checkpoint; int8 rounds them, as in `save_pretrained`; float
            writes the numbers that int8 ones stand for.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint does not fit its model or holds NaN or infinity; the folder is not empty, or cannot be
            written; or the weights are unknown, or not for such a model.
    """
    int8 = writes_int8(opened, weights)
    opened.begin(seed)
    model, folder = opened.model, Path(folder)
    tensors = _streams(opened, int8, None if adapter is None else Path(adapter))
    heads, head_tensors = _heads(opened)
    fingerprint = _fingerprint(opened, adapter, seed, max_shard_bytes, int8)
    with resumable_folder(folder, fingerprint, overwrite=overwrite) as unfinished:
        place = unfinished.path
        write_settings(model, place, tokenizer=tokenizer, source=opened.hf_config, end_tokens=end_tokens, int8=int8)
        write_tensors(tensors, place, max_shard_bytes=max_shard_bytes, note=note, write=unfinished.write)
        if heads is not None:
            unfinished.write(head_tensors, place / HEADS_FILE, note)
            note_heads(heads, place)
        card = model_card(model, name=folder.resolve().name, base=base, figures=figures, heads=heads, int8=int8)
        (place / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def converted_bytes(opened: Pretrained, weights: str = "stored") -> int:
    """Bytes of all tensors that a conversion will write; nothing is read."""
    tensors = (_streams(opened, writes_int8(opened, weights)), _heads(opened)[1])
    return sum(tensor.nbytes for each in tensors for tensor in each.values())


def writes_int8(opened: Pretrained, weights: str) -> bool:
    """True if a conversion of a checkpoint writes int8 matrices.

    Args:
        opened: the checkpoint.
        weights: as in `convert`.

    Raises:
        UserError: the weights are unknown.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights '{weights}' are unknown; choose one of {', '.join(WEIGHTS)}")
    return weights == "int8" or (weights == "stored" and opened.rounded)


def _streams(opened: Pretrained, int8: bool, adapter: Path | None = None) -> dict[str, StreamedTensor]:
    model, tensors = opened.model, opened.tensors
    updates = {} if adapter is None else adapter_updates(model, adapter)
    entries = family_of_model(model).entries(model)
    found = streams(model, entries, tensors, updates)
    if not int8:
        return found
    kept = {name: tensor for name, tensor in tensors.items() if entries[name].path not in updates}
    return rounded_streams(found, output_axes(model, entries), kept)


def _heads(opened: Pretrained) -> tuple[MedusaHeads | None, dict[str, StreamedTensor]]:
    """Medusa heads beside the checkpoint, abstract, and their tensors."""
    if not opened.folder.is_dir() or not has_heads(opened.folder):
        return None, {}
    heads, tensors = open_heads(opened.folder, opened.model)
    if problems := mismatches(heads, entries(heads), tensors):
        raise UserError(f"the heads in {opened.folder} do not fit the model: {summary(problems)}")
    return heads, streams(heads, entries(heads), tensors)


def _fingerprint(opened: Pretrained, adapter: str | Path | None, seed: int, max_shard_bytes: int, int8: bool) -> str:
    """All that the files of tensors follow from: the source's files, the model, and the options."""
    paths = {tensor.pages.path for tensor in opened.tensors.values() if isinstance(tensor, LazyTensor)}
    paths |= {path for each in opened.tensors.values() if isinstance(each, RoundedTensor) for path in each.paths}
    if opened.folder.is_file():
        paths = {opened.folder}
    elif has_heads(opened.folder):
        paths.add(opened.folder / HEADS_FILE)
    if adapter is not None:
        paths |= {path for path in Path(adapter).iterdir() if path.is_file()}
    sizes = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    content = [sizes, config_json(opened.model, int8=int8), seed, max_shard_bytes]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
