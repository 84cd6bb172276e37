"""The README.md of an exported model: what it is, how large, how to open it, and what was measured."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lin_jax.attention import parse_name
from lin_jax.hub.description import attentions_of, describe, has_remote_code, is_softmax
from lin_jax.hub.families import family_of_model
from lin_jax.hub.sizes import context_length, parameter_count, state_bytes
from lin_jax.models import MedusaHeads

CARD_FILE = "README.md"
# Sizes of an attention, and the bases or additions that they matter to.
_SIZES = {
    "kernel_size": ("convolution",),
    "local_score": ("local", "flash", "flash_local", "linear_angular"),
    "features": ("performer", "rfa"),
    "rank": ("linformer",),
    "hashes": ("yoso",),
    "hash_bits": ("yoso",),
    "diagonal_layers": ("transnormer",),
}
_KNOWN_ONLY_HERE = "The model opens with `lin_jax` only."


def model_card(
    model: Any,
    *,
    name: str,
    base: str | None = None,
    figures: Mapping[str, Any] | None = None,
    heads: MedusaHeads | None = None,
) -> str:
    """The card of a model as Markdown, with the metadata that the Hub reads at its head.

    Args:
        model: of a family of the hub.
        name: of the folder, and so of the model.
        base: what it came from.
        figures: measured figures by name.
        heads: Medusa heads that lie beside the model.
    """
    family, config = family_of_model(model), model.config
    linearized = not is_softmax(config)
    about = [f"A {'linearized ' if linearized else ''}{family.name} model, written by `lin_jax`."]
    if base:
        about.append(f"It was made from {base}.")
    if linearized:
        about.append(f"Its attention: {_attention_text(config)}.")
    if heads is not None:
        about.append(f"{heads.count} Medusa heads lie beside it in `medusa_lm_head.safetensors`.")
    parts = [_metadata(family.name, linearized), f"# {name}", " ".join(about), _table(_sizes(model)), _loading(model)]
    if figures:
        parts.append("## Measured\n\n" + _table({key: _figure(value) for key, value in figures.items()}))
    return "\n\n".join(parts) + "\n"


def _metadata(family: str, linearized: bool) -> str:
    tags = ["jax", "lin_jax", family, *(["linear-attention"] if linearized else [])]
    lines = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _attention_text(config: Any) -> str:
    texts = []
    for place, attention in attentions_of(config).items():
        base, local, convolution = parse_name(attention.name)
        parts = {base, *(["local"] if local else []), *(["convolution"] if convolution else [])}
        sizes = {"group_size": attention.group_size} if parts != {"softmax"} else {}
        values = asdict(attention)
        sizes |= {size: values[size] for size, needs in _SIZES.items() if parts & set(needs)}
        said = ", ".join(f"{size} {value}" for size, value in sizes.items() if value is not None)
        texts.append(f"{place + ': ' if place else ''}`{attention.name}`" + (f" ({said})" if said else ""))
    return "; ".join(texts)


def _sizes(model: Any) -> dict[str, str]:
    config = model.config
    length = context_length(config) or 2048
    rows = {
        "parameters": f"{parameter_count(model):,}",
        "layers": str(config.num_layers),
        "width": str(config.hidden_size),
        "vocabulary": str(config.vocab_size),
        "type of the parameters": config.param_dtype,
    }
    state = state_bytes(model, length)
    if state is not None:
        rows[f"decode state of one sequence of {length:,} tokens"] = f"{state / 1024:,.0f} KiB"
    return rows


def _loading(model: Any) -> str:
    here = 'from lin_jax.hub import from_pretrained\n\nmodel = from_pretrained("FOLDER")'
    text = f"## Opening it\n\nWith JAX:\n\n```python\n{here}\n```\n\n"
    if not is_softmax(model.config) and not has_remote_code(model):
        return text + _KNOWN_ONLY_HERE
    option = ", trust_remote_code=True" if has_remote_code(model) else ""
    name = _automatic_class(describe(model)["architectures"][0])
    # transformers opens the configuration for the tokenizer's sake too, and asks about its code.
    opened = (("model", name), ("tokenizer", "AutoTokenizer"))
    lines = "\n".join(f'{variable} = {each}.from_pretrained("FOLDER"{option})' for variable, each in opened)
    there = f"from transformers import {name}, AutoTokenizer\n\n{lines}"
    return text + f"With PyTorch:\n\n```python\n{there}\n```"


def _automatic_class(architecture: str) -> str:
    for ending, name in (
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("Model", "AutoModel"),
    ):
        if architecture.endswith(ending) and not architecture.endswith("LMHeadModel"):
            return name
    return "AutoModelForCausalLM"


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
