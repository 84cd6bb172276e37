"""Model cards: the README.md of a saved model, with its attention, sizes, code to open it, and measurements."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lin_jax.attention import parse_name
from lin_jax.attention.registry import AUGMENTATIONS
from lin_jax.hub.config_json import attentions_of, config_json, has_remote_code, is_known, is_softmax
from lin_jax.hub.export.torch_source.versions_lin_jax import NEWEST, OLDEST
from lin_jax.hub.families.registry import family_of_model
from lin_jax.hub.int8.matrices import is_feature_map
from lin_jax.hub.sizes import context_length, parameter_count, state_bytes
from lin_jax.models import MedusaHeads

CARD_FILE = "README.md"
# Sizes of an attention, and the attentions or augmentations that they belong to.
_SIZES = {
    "kernel_size": ("convolution",),
    "local_score": ("local", "flash", "flash_local", "linear_angular"),
    "features": ("performer", "rfa", "exponential"),
    "rank": ("linformer",),
    "hashes": ("yoso",),
    "hash_bits": ("yoso",),
    "diagonal_layers": ("transnormer",),
    "window": ("window",),
    "window_groups": ("window",),
}
# What a folder with code of its own needs.
_OWN_CODE = """\
The code of the model is in the `.py` files here, and needs nothing else: `pip install torch "transformers>={}"`."""
# And what it can do, where it writes texts.
_WRITES = """\
`model.generate` samples, searches with beams, {padding}, and writes several texts of a prompt. Greedy text is
written faster, and token for token the same, with guesses that are verified in one pass:

```python
model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100, speculative=True)
```

The guesses are copied from {text}; Medusa heads, where they lie beside the model, guess the rest. Each
prompt of a batch takes as many as are right; with sampling or beams, `speculative=True` ends in an error that says so.
With weights in bfloat16 or float16, a pass over several tokens may round another way than a pass over one. The model
takes no `assistant_model` and is none: its state does not go back to fewer tokens."""
_WRITERS = {
    "AutoModelForCausalLM": {"padding": "pads on the left", "text": "the text so far"},
    "AutoModelForSeq2SeqLM": {
        "padding": "takes sources of several lengths (pad them on the right: groups of tokens begin at a row's start)",
        "text": "what it has written so far",
    },
}
_INT8 = (
    "The matrices of its linear layers, its head and its table of tokens are int8, with a float32 factor for each "
    "output or token."
)
_NARROW_MAPS = "Its learnt feature maps are bfloat16."
_KNOWN_ONLY_HERE = "The model opens with `lin_jax` only."


def model_card(
    model: Any,
    *,
    name: str,
    base: str | None = None,
    figures: Mapping[str, Any] | None = None,
    heads: MedusaHeads | None = None,
    int8: bool = False,
) -> str:
    """The model card as Markdown, with the metadata that the Hub reads at its top.

    Args:
        model: of a family in `lin_jax.hub.families`.
        name: of the folder, and so of the model.
        base: name of the model that it was made from.
        figures: measured figures by name.
        heads: Medusa heads in the same folder.
        int8: whether its matrices are int8 there.
    """
    family, config = family_of_model(model), model.config
    linearized = not is_softmax(config)
    summary = [f"A {'linearized ' if linearized else ''}{family.name} model, written by `lin_jax`."]
    if base:
        summary.append(f"It was made from {base}.")
    if linearized:
        summary.append(f"Its attention: {_attention_text(config)}.")
    if int8:
        summary.append(_INT8)
        if any(map(is_feature_map, family.entries(model))):
            summary.append(_NARROW_MAPS)
    if heads is not None:
        summary.append(f"{heads.count} Medusa heads are beside it in `medusa_lm_head.safetensors`.")
    sections = [_metadata(family.name, linearized), f"# {name}", " ".join(summary), _table(_sizes(model))]
    sections.append(_loading(model, int8=int8))
    if figures:
        sections.append("## Measured\n\n" + _table({key: _figure(value) for key, value in figures.items()}))
    return "\n\n".join(sections) + "\n"


def is_export(folder: Path) -> bool:
    """True for a folder whose model card this package wrote."""
    card = folder / CARD_FILE
    return card.is_file() and "\n- lin_jax\n" in card.read_text(encoding="utf-8", errors="replace")[:500]


def _metadata(family: str, linearized: bool) -> str:
    tags = ["jax", "lin_jax", family, *(["linear-attention"] if linearized else [])]
    lines = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _attention_text(config: Any) -> str:
    texts = []
    every = [(name, kind) for name, attention in attentions_of(config).items() for kind in attention.kinds]
    own = getattr(config, "attention", None)
    if own is not None and len(own.kinds) > 1:
        texts.append(f"{own.label} over the layers in turn")
    for name, attention in every:
        base, *added = parse_name(attention.name)
        parts = {base, *(part for part, has in zip(AUGMENTATIONS, added, strict=True) if has)}
        values = asdict(attention)
        sizes: dict[str, Any] = {"group_size": attention.group_size} if parts != {"softmax"} else {}
        sizes |= {size: values[size] for size, needs in _SIZES.items() if parts & set(needs)}
        if attention.window is not None:
            sizes |= {"window": attention.window, "group_size": None, "window_groups": None}
        if attention.sinks:
            sizes["sinks"] = attention.sinks
        if attention.decay != "none":
            sizes["decay"] = attention.decay
        listed = ", ".join(f"{size} {value}" for size, value in sizes.items() if value is not None)
        texts.append(f"{name + ': ' if name else ''}`{attention.name}`" + (f" ({listed})" if listed else ""))
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


def _loading(model: Any, *, int8: bool) -> str:
    here = 'from lin_jax.hub import from_pretrained\n\nmodel = from_pretrained("FOLDER")'
    text = f"## Opening it\n\nWith JAX:\n\n```python\n{here}\n```\n\n"
    own_code = has_remote_code(model, int8=int8)
    if not is_known(family_of_model(model), model.config) and not own_code:
        return text + _KNOWN_ONLY_HERE
    option, versions = "", ""
    if own_code:
        option, versions = ", trust_remote_code=True", f" and transformers {OLDEST} or newer (tried up to {NEWEST})"
    name = _automatic_class(config_json(model, int8=int8)["architectures"][0])
    # transformers opens the configuration for the tokenizer's sake too, and asks about its code.
    opened = (("model", name), ("tokenizer", "AutoTokenizer"))
    lines = "\n".join(f'{variable} = {each}.from_pretrained("FOLDER"{option})' for variable, each in opened)
    there = f"from transformers import {name}, AutoTokenizer\n\n{lines}"
    text += f"With PyTorch{versions}:\n\n```python\n{there}\n```"
    if not option:
        return text
    writes = [_WRITES.format(**_WRITERS[name])] if name in _WRITERS else []
    return "\n\n".join([text, _OWN_CODE.format(OLDEST), *writes])


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
