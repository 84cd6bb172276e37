"""FLASH checkpoints: a `config.json` of our own, since Hugging Face has no such model, and the published names."""

from collections.abc import Mapping
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.mixers import mixer_entries
from lin_jax.hub.tensors import Entries, Entry, fill, kernel, present, stacked
from lin_jax.models import Flash, FlashConfig, FlashEncoder

TOP = {
    "token_emb.weight": Entry(("embed", "embedding")),
    "abs_pos_emb.scale": Entry(("position_scale",)),
    "to_logits.0.weight": Entry(("norm", "scale")),
    "to_logits.0.bias": Entry(("norm", "bias")),
    "to_logits.1.weight": kernel("head"),
    "to_logits.1.bias": Entry(("head", "bias")),
}
NORMS = {
    "scale": {"norm.g": Entry(("norm", "scale"))},
    "layer": {"norm.weight": Entry(("norm", "scale")), "norm.bias": Entry(("norm", "bias"))},
}
LAYER = {
    "to_hidden.0.weight": kernel("values_and_gate"),
    "to_hidden.0.bias": Entry(("values_and_gate", "bias")),
    "to_qk.0.weight": kernel("shared"),
    "to_qk.0.bias": Entry(("shared", "bias")),
    "qk_offset_scale.gamma": Entry(("gamma",)),
    "qk_offset_scale.beta": Entry(("beta",)),
    "rel_pos_bias.relative_attention_bias.weight": Entry(("relative_bias",)),
    "to_out.weight": kernel("out"),
    "to_out.bias": Entry(("out", "bias")),
}
# Frequencies that follow from the sizes.
DERIVED = ("abs_pos_emb.inv_freq", ".rotary_pos_emb.freqs")
MODEL_TYPE = "flash_gau"
# Names in `config.json`, and in `FlashConfig`.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "query_key_size": "query_key_size",
    "expansion_factor": "expansion_factor",
    "norm": "norm",
    "shift_tokens": "shift_tokens",
    "relative_buckets": "relative_buckets",
    "relative_max_distance": "relative_max_distance",
    "length_scale": "length_scale",
    "norm_eps": "norm_eps",
    "initializer_range": "initializer_range",
}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "query_key_size")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> FlashConfig:
    """A FLASH configuration from the contents of a `config.json`, with the given attention (default: both branches).

    Raises:
        UserError: a size is missing, or has a value that no FLASH has.
    """
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the configuration has no {', '.join(missing)}; give the config.json of a FLASH")
    options = {here: config[there] for there, here in FIELDS.items() if there in config}
    return FlashConfig(**options, attention=attention or AttentionConfig(name="flash"))


def config_to_huggingface(config: FlashConfig, architecture: str = "FlashForCausalLM") -> dict[str, Any]:
    """The contents of a `config.json`; `architecture` names the kind of model that has the configuration."""
    about = {"model_type": MODEL_TYPE, "architectures": [architecture], "torch_dtype": config.param_dtype}
    return about | {there: getattr(config, here) for there, here in FIELDS.items()}


def entries(model: Flash | FlashEncoder) -> Entries:
    """Every tensor that this model has, by name."""
    stack = ("layers", "layers")
    # A unit is its own attention: its mixer's names have nothing before them.
    mixer = {name.removeprefix("."): entry for name, entry in mixer_entries(model, stack, ("mixer",), "").items()}
    layer = NORMS[model.config.norm] | LAYER | mixer
    return present(model, TOP | stacked("layers", layer, stack, model.config.num_layers))


def ignored(name: str) -> bool:
    """Whether a tensor may be there without being read."""
    return name.endswith(DERIVED)


def own_tensors(model: Flash | FlashEncoder, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is for this model: all but what `ignored` names."""
    del model
    return {name: tensor for name, tensor in tensors.items() if not ignored(name)}


def read_flash(model: Flash | FlashEncoder, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be one of shapes, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))
