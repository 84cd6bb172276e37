"""What the commands of `python -m lin_jax.hub` do."""

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
from lin_jax.data import Tokenizer
from lin_jax.data.llama2c_tokenizer import load_tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.adapters import load_adapters, save_adapters
from lin_jax.hub.files import is_checkpoint_folder
from lin_jax.hub.inspect import table
from lin_jax.hub.medusa import has_heads, load_heads
from lin_jax.hub.pretrained import Pretrained, from_pretrained
from lin_jax.hub.saving import TOKENIZER_FILES, check_place, save_pretrained
from lin_jax.hub.tensors import stored
from lin_jax.models import MedusaHeads, PathHead
from lin_jax.models.lora import merge_lora
from lin_jax.which_step import Step


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
) -> None:
    """Writes a folder from a Hugging Face folder, a repository on the Hub or a file of llama2.c.

    The LoRA adapters of a PEFT folder, if one is given, are merged into the model.

    Raises:
        UserError: the source cannot be read as a model, or the folder not be written.
    """
    check_place(Path(out), overwrite=overwrite)
    opened = Pretrained.open(source, attention=attention, param_dtype=dtype, head=head)
    found = _find_tokenizer(opened, tokenizer)
    measured = _read_figures(figures)
    with _bar("reading", sum(tensor.nbytes for tensor in opened.tensors.values())) as note:
        model = opened.load(seed=seed, note=note)
    if adapter is not None:
        load_adapters(model, adapter)
        merge_lora(model)
    heads = None
    if opened.folder.is_dir() and has_heads(opened.folder):
        heads = load_heads(opened.folder, model)
    _save(model, out, found, heads, opened.description, source, measured, max_shard_bytes, overwrite)


def export_run(
    source: str,
    out: str,
    *,
    step: Step = None,
    dtype: str | None = None,
    figures: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    adapters: bool = False,
) -> None:
    """Writes a folder from a run folder: its model and tokenizer, with the heads that stand on it or lie in it.

    A run's LoRA adapters are merged into the model, or written alone, as a PEFT folder.

    Raises:
        UserError: there is no such run, or the folder cannot be written.
    """
    check_place(Path(out), overwrite=overwrite)
    folder = Path(source)
    if adapters:
        return _export_adapters(folder, out, step, overwrite)
    if is_checkpoint_folder(folder):
        if step is not None:
            raise UserError(f"{source} is a Hugging Face folder, which has no steps; leave --step out")
        return import_checkpoint(
            source, out, dtype=dtype, figures=figures, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )
    if not folder.is_dir():
        raise UserError(f"there is no folder {source}; give the output of a train.py run")
    measured = _read_figures(figures)
    model, tokenizer, heads = _load_run(folder, step)
    if dtype is not None:
        model, heads = _cast(model, dtype), None if heads is None else _cast(heads, dtype)
    _save(model, out, tokenizer, heads, None, None, measured, max_shard_bytes, overwrite)
    return None


def _export_adapters(run: Path, out: str, step: Step, overwrite: bool) -> None:
    from lin_jax.training.config import load_run_config
    from lin_jax.training.loading import load_adapters as load_run_adapters

    model, base = load_run_adapters(run, step)
    save_adapters(model, out, base=str(base), overwrite=overwrite)
    print(f"{out} holds the adapters of {run}, for {base}")
    config = load_run_config(run).adapters
    if config is not None and config.also:
        print(f"{', '.join(sorted(config.also))} learnt in full, and are only in what is exported without --adapters")


def inspect_checkpoint(source: str, *, attention: AttentionConfig | None = None) -> int:
    """Prints what a checkpoint is; 1 if some of its tensors do not fit, else 0."""
    opened = Pretrained.open(source, attention=attention)
    print(table(opened))
    return 1 if opened.problems() else 0


def _load_run(folder: Path, step: Step) -> tuple[Any, Tokenizer, MedusaHeads | None]:
    # Imported only now: checkpoints of runs need Orbax, Hugging Face folders do not.
    from lin_jax.training.config import load_run_config
    from lin_jax.training.loading import load_heads as load_run_heads
    from lin_jax.training.loading import load_model, read_base
    from lin_jax.training.objectives import OBJECTIVES

    heads_folder = folder / "heads" if (folder / "heads").is_dir() else None
    heads_step = None
    kind = OBJECTIVES[load_run_config(folder).objective]
    if kind.heads_name is not None:
        heads_folder, heads_step = folder, step
    if not kind.has_model:
        base = read_base(folder)
        folder, step = base.folder, base.step
    if is_checkpoint_folder(folder):
        model, tokenizer = from_pretrained(folder), Tokenizer.load(folder)
    else:
        model, tokenizer = load_model(folder, step)[0], Tokenizer.load(folder / "tokenizer")
    heads = None if heads_folder is None else load_run_heads(heads_folder, heads_step, model=model)
    if isinstance(heads, PathHead):
        raise UserError(f"{heads_folder} holds a path head, which has no published form; export {folder} without it")
    return model, tokenizer, heads


def _cast(module: Any, dtype: str) -> Any:
    """The module with its parameters in another type."""
    state = nnx.state(module, nnx.Param)
    nnx.update(
        module,
        nnx.from_flat_state([(p, v.replace(v[...].astype(jnp.dtype(dtype)))) for p, v in nnx.to_flat_state(state)]),
    )
    if hasattr(module, "config"):
        module.config = replace(module.config, param_dtype=dtype)
    return module


def _find_tokenizer(opened: Pretrained, place: str | None) -> Tokenizer | Path | None:
    if place is not None and Path(place).is_file():
        return load_tokenizer(place, opened.model.config.vocab_size)
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
        raise UserError(f"--figures {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--figures {path} must hold a JSON object of names and numbers")
    return {name: value for name, value in content.items() if isinstance(value, int | float | str)}


def _save(
    model: Any,
    out: str,
    tokenizer: Tokenizer | Path | None,
    heads: MedusaHeads | None,
    source: dict[str, Any] | None,
    base: str | None,
    figures: dict[str, Any] | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    size = sum(variable[...].nbytes for variable in stored(model).values())
    with _bar("writing", size) as note:
        folder = save_pretrained(
            model,
            out,
            tokenizer=tokenizer,
            heads=heads,
            source=source,
            base=None if base is None else Path(base).name,
            figures=figures,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            note=note,
        )
    print(f"{folder} holds the model")


@contextmanager
def _bar(title: str, size: int) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes on a terminal; nothing elsewhere."""
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        yield bar.update
