"""A checkpoint as a table: family, sizes, attention, tensors, state, tokenizer, what is left out and does not fit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.config_json import attentions_of
from lin_jax.hub.families.tensor_names import plain_names
from lin_jax.hub.files import is_checkpoint_folder, listed
from lin_jax.hub.int8.tensor import RoundedTensor
from lin_jax.hub.load import Pretrained
from lin_jax.hub.peft import PREFIX, open_adapters
from lin_jax.hub.peft_config import CONFIG, read_adapter_config
from lin_jax.hub.save import TOKENIZER_FILES
from lin_jax.hub.sizes import context_length, parameter_count, state_bytes
from lin_jax.hub.tensors import summary
from lin_jax.json_files import read_json
from lin_jax.models import CausalModel
from lin_jax.training.model_source import ModelSource

# Tensors that do not fit, named one by one; a wholly different model has hundreds.
_NAMED = 20
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def table(opened: Pretrained) -> str:
    """Formats the table; nothing of the checkpoint but its headers is read, and its tokenizer."""
    rows = [("checkpoint", str(opened.folder)), *_model_rows(opened), *_tokenizer_rows(opened), *_tensor_rows(opened)]
    rows += [("note", each) for each in opened.notes]
    return _formatted([*rows, *_problem_rows(opened)])


def holds_adapters(folder: Path) -> bool:
    """True for a folder that holds adapters, and not the model that they belong to."""
    return (folder / CONFIG).is_file() and not is_checkpoint_folder(folder)


def adapter_table(folder: Path) -> tuple[str, bool]:
    """Formats the table of a PEFT folder, of which headers alone are read; also returns whether it can be read."""
    rows = [("adapters", str(folder))]
    try:
        base = read_json(folder / CONFIG).get("base_model_name_or_path") or "BASE"
        config, tensors = read_adapter_config(folder), open_adapters(folder)
    except UserError as error:
        return _formatted([*rows, ("cannot be read", str(error))]), False
    layers = sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in plain_names(tensors)})
    ranks = {config.rank(layer) for layer in layers}
    factors = {round(config.factor(layer), 6) for layer in layers}
    rows += [
        ("kind", "LoRA, in PEFT's layout"),
        ("base", str(base)),
        ("ranks", ", ".join(map(str, sorted(ranks)))),
        ("factors", ", ".join(f"{factor:g}" for factor in sorted(factors))),
        ("layers", f"{len(layers):,}: {listed(layers)}"),
        *_type_rows(tensors),
        ("what to do", f"merge them: python -m lin_jax hub import {base} OUT --adapter {folder}"),
    ]
    return _formatted(rows), True


def _formatted(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _tokenizer_rows(opened: Pretrained) -> list[tuple[str, str]]:
    """The tokenizer beside the model, and what ends a text."""
    folder, source = opened.folder, ModelSource(opened.folder)
    if folder.is_file() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [("tokenizer", "none; name one with --tokenizer where texts are needed")]
    try:
        tokenizer = source.tokenizer()
        rows = [("tokenizer", _entries(tokenizer, opened.model.config.vocab_size))]
        if isinstance(opened.model, CausalModel):
            named = (f"{token} {tokenizer.backend.id_to_token(token)!r}" for token in source.end_tokens(tokenizer))
            rows.append(("texts end at", ", ".join(named) or "no token"))
        return rows
    except UserError as error:
        return [("tokenizer", f"cannot be used: {error}")]


def _entries(tokenizer: Tokenizer, known: int) -> str:
    more = tokenizer.vocab_size - known
    if more <= 0:
        return f"{tokenizer.vocab_size:,} entries"
    first = tokenizer.backend.id_to_token(known)
    return (
        f"{tokenizer.vocab_size:,} entries, {more:,} more than the model: texts with {first!r} and the like are refused"
    )


def _model_rows(opened: Pretrained) -> list[tuple[str, str]]:
    model, config = opened.model, opened.model.config
    length = context_length(config) or 2048
    rows = [
        ("family", f"{opened.family.name} ({opened.hf_config['model_type']}), {type(model).__name__}"),
        ("parameters", f"{parameter_count(model):,}"),
        ("layers", str(config.num_layers)),
        ("width", str(config.hidden_size)),
    ]
    heads = getattr(config, "num_heads", None)
    if heads is not None:
        shared = getattr(config, "num_kv_heads", None)
        rows.append(("heads", f"{heads}" + (f" ({shared} for keys and values)" if shared not in (None, heads) else "")))
    rows += [("vocabulary", str(config.vocab_size)), ("longest text", f"{length:,} tokens")]
    for place, attention in attentions_of(config).items():
        rows.append((f"attention {place}".rstrip(), _changes(attention)))
    state = state_bytes(model, length)
    if state is not None:
        rows.append(("decode state", f"{_size(state)} per sequence of {length:,} tokens"))
    return rows


def _changes(attention: AttentionConfig) -> str:
    """The name, and the fields that are not the default."""
    plain = AttentionConfig()
    if attention.pattern is not None or attention.layers is not None:
        return "; ".join([attention.label, *map(_changes, attention.kinds)])
    names = [name for name in vars(plain) if name != "name" and getattr(attention, name) != getattr(plain, name)]
    return ", ".join([attention.name, *(f"{name} {getattr(attention, name)}" for name in names)])


def _type_rows(tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts: dict[str, list[int]] = {}
    for tensor in tensors.values():
        kind = "int8, with factors" if isinstance(tensor, RoundedTensor) else tensor.dtype.name
        count = counts.setdefault(kind, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    return [(f"tensors {kind}", f"{count:,}, {_size(size)}") for kind, (count, size) in sorted(counts.items())]


def _tensor_rows(opened: Pretrained) -> list[tuple[str, str]]:
    rows = _type_rows(opened.tensors)
    if opened.rounded:
        rows.append(("weights", "int8, for decoding; to train them: hub import FOLDER OUT --weights float"))
    if opened.left_out:
        rows.append(("left out", f"{len(opened.left_out):,}: {listed(opened.left_out)}"))
    if opened.adds:
        rows.append(("begins anew", ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in opened.adds}))))
    return rows


def _problem_rows(opened: Pretrained) -> list[tuple[str, str]]:
    problems = opened.problems()
    if not problems:
        return [("fits", "every tensor")]
    rows = [("does not fit" if number == 0 else "", str(each)) for number, each in enumerate(problems[:_NAMED])]
    rows += [("in short", f"{summary(problems)}")] if len(problems) > _NAMED else []
    remedy = opened.remedy(problems)
    return rows + ([("what to do", remedy)] if remedy else [])


def _size(count: float) -> str:
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
