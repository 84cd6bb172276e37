"""Imports, exports and inspects Hugging Face folders from a terminal."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.inspect import adapter_table, holds_adapters, table
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.data.sources.remote import MODEL, fetch_file, given_by, is_remote, is_remote_file
from lin_jax.data.tokenizers.sentencepiece import read_sentencepiece
from lin_jax.errors import UserError
from lin_jax.hub.conversion.convert import convert, converted_bytes, writes_int8
from lin_jax.hub.files import is_checkpoint_folder
from lin_jax.hub.load import Pretrained
from lin_jax.hub.peft import save_adapters
from lin_jax.hub.save import TOKENIZER_FILES, check_output_folder, save_pretrained
from lin_jax.hub.tensors import stored
from lin_jax.models import MedusaHeads, PathHead
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.config import CONFIG_FILE
from lin_jax.training.model_source import ModelSource
from lin_jax.training.objectives.registry import kind_of


def import_checkpoint(
    source: str,
    out: str,
    *,
    attention: AttentionConfig | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    head: str | None = None,
    seed: int = 0,
    figures: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    weights: str = "stored",
) -> None:
    """Writes a folder from a Hugging Face folder, a repository on the Hub or a file of llama2.c.

    The LoRA adapters of a PEFT folder, if one is given, are merged into the model.

    Raises:
        UserError: the source cannot be read as a model, or the folder not be written.
    """
    check_output_folder(Path(out), overwrite=overwrite)
    opened = Pretrained.open(source, attention=attention, param_dtype=dtype, head=head)
    if dtype is None and writes_int8(opened, weights) and opened.rounded:
        # What is not rounded keeps its type, too.
        opened = Pretrained.open(source, attention=attention, param_dtype=opened.model.config.dtype, head=head)
    found = _find_tokenizer(opened, tokenizer)
    measured = _read_figures(figures)
    # A file of llama2.c names no end tokens: its texts follow each other.
    ends: tuple[int, ...] = ()
    if isinstance(found, Tokenizer) and opened.folder.is_file():
        ends = ModelSource(opened.folder).end_tokens(found)
    with _bar("converting", converted_bytes(opened, weights)) as note:
        folder = convert(
            opened,
            out,
            adapter=adapter,
            tokenizer=found,
            base=Path(source).name,
            figures=measured,
            end_tokens=ends,
            seed=seed,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            note=note,
            weights=weights,
        )
    print(f"{folder} holds the model")


def export_run(
    source: str,
    out: str,
    *,
    step: CheckpointSelector = None,
    dtype: str | None = None,
    figures: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    adapters: bool = False,
    weights: str = "stored",
) -> None:
    """Writes a folder from a run folder: its model and tokenizer, with the heads that stand on it or lie in it.

    A run's LoRA adapters are merged into the model, or written alone, as a PEFT folder.

    Raises:
        UserError: there is no such run, or the folder cannot be written.
    """
    check_output_folder(Path(out), overwrite=overwrite)
    opened = ModelSource.open(source, step)
    if adapters:
        return _export_adapters(opened, out, overwrite)
    if not opened.is_run:
        return import_checkpoint(
            source,
            out,
            dtype=dtype,
            figures=figures,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            weights=weights,
        )
    measured = _read_figures(figures)
    model, tokenizer, heads, ends = _load_run(opened)
    if dtype is not None:
        model, heads = _cast(model, dtype), None if heads is None else _cast(heads, dtype)
    _save(
        model,
        out,
        tokenizer,
        heads,
        figures=measured,
        end_tokens=ends,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        weights="int8" if weights == "int8" else "stored",
    )
    return None


def _export_adapters(source: ModelSource, out: str, overwrite: bool) -> None:
    model, base = source.unmerged(), source.base.folder
    save_adapters(model, out, base=str(base), overwrite=overwrite)
    print(f"{out} holds the adapters of {source.place}, for {base}")
    config = source.run.adapters
    if config is not None and config.modules_to_save:
        print(
            f"{', '.join(sorted(config.modules_to_save))} were trained in full, and are only in what is exported "
            "without --adapters"
        )


def inspect_checkpoint(source: str, *, attention: AttentionConfig | None = None) -> int:
    """Prints what a checkpoint or a folder of adapters is; 1 if it cannot be read as it is, else 0."""
    if holds_adapters(Path(source)):
        shown, readable = adapter_table(Path(source))
        print(shown)
        return 0 if readable else 1
    if (Path(source) / CONFIG_FILE).is_file() and not is_checkpoint_folder(Path(source)):
        raise UserError(f"{source} is a run of train.py; make a folder of it with hub export {source} OUT, or give one")
    opened = Pretrained.open(source, attention=attention)
    print(table(opened))
    return 1 if opened.problems() else 0


def _load_run(run: ModelSource) -> tuple[Any, Tokenizer, MedusaHeads | None, tuple[int, ...]]:
    """Reads a run's model, tokenizer and end tokens, and the heads that it trained, or that lie in its folder."""
    trains = kind_of(run.run).trains
    inside = run.place / "heads"
    heads_source = run if trains.has_heads else ModelSource(inside) if inside.is_dir() else None
    source = run
    if not trains.has_model:
        base = run.base
        source = ModelSource(base.folder)
        source = ModelSource(base.folder, base.step) if source.is_run else source
    model, tokenizer = source.model(), source.tokenizer(run.run.data.tokenizer)
    heads = None if heads_source is None else heads_source.heads(model)
    if isinstance(heads, PathHead):
        raise UserError(f"{run.place} holds a path head, which has no published form; export {source.place} without it")
    return model, tokenizer, heads, source.end_tokens(tokenizer)


def _cast(module: Any, dtype: str) -> Any:
    """The module with its parameters in another type; one of them at a time is there in both."""
    for path in [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]:
        variable = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))[path]
        nnx.update(module, nnx.from_flat_state([(path, variable.replace(variable[...].astype(jnp.dtype(dtype))))]))
    if hasattr(module, "config"):
        module.config = replace(module.config, param_dtype=dtype)
    return module


def _find_tokenizer(opened: Pretrained, place: str | None) -> Tokenizer | Path | None:
    if place is not None and is_remote(place):
        with given_by("--tokenizer"):
            if not is_remote_file(place):
                return load_tokenizer(place)
            place = str(fetch_file(place, MODEL))
    if place is not None and Path(place).is_file():
        return read_sentencepiece(place, opened.model.config.vocab_size)
    if place is not None:
        return Path(place)
    if opened.folder.is_file():
        raise UserError(f"{opened.folder} holds no tokenizer; say where it is with --tokenizer FILE")
    return opened.folder if any((opened.folder / name).is_file() for name in TOKENIZER_FILES) else None


def _read_figures(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--figures {path} cannot be read as JSON ({reason}); give a file with an object") from error
    if not isinstance(content, dict):
        raise UserError(f"--figures {path} holds no JSON object; give one of names and numbers")
    return {name: value for name, value in content.items() if isinstance(value, int | float | str)}


def _save(
    model: Any,
    out: str,
    tokenizer: Tokenizer,
    heads: MedusaHeads | None,
    **options: Any,
) -> None:
    size = sum(variable[...].nbytes for variable in stored(model).values())
    with _bar("writing", size) as note:
        folder = save_pretrained(
            model,
            out,
            tokenizer=tokenizer,
            heads=heads,
            **options,
            note=note,
        )
    print(f"{folder} holds the model")


@contextmanager
def _bar(title: str, size: int) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes on a terminal; nothing elsewhere."""
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        yield bar.update
