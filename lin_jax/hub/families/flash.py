"""FLASH checkpoints: a `config.json` of our own, since Hugging Face has no such model, and the published names."""

from collections.abc import Mapping
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.hub.families.mixers import mixer_entries
from lin_jax.hub.families.tensor_names import plain_names
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, present, stacked
from lin_jax.models import Flash, FlashConfig, FlashEncoder

TOP = {
    "token_emb.weight": TensorEntry(("embed", "embedding")),
    "abs_pos_emb.scale": TensorEntry(("position_scale",)),
    "to_logits.0.weight": TensorEntry(("norm", "scale")),
    "to_logits.0.bias": TensorEntry(("norm", "bias")),
    "to_logits.1.weight": kernel("head"),
    "to_logits.1.bias": TensorEntry(("head", "bias")),
}
NORMS = {
    "scale": {"norm.g": TensorEntry(("norm", "scale"))},
    "layer": {"norm.weight": TensorEntry(("norm", "scale")), "norm.bias": TensorEntry(("norm", "bias"))},
}
LAYER = {
    "to_hidden.0.weight": kernel("values_and_gate"),
    "to_hidden.0.bias": TensorEntry(("values_and_gate", "bias")),
    "to_qk.0.weight": kernel("shared"),
    "to_qk.0.bias": TensorEntry(("shared", "bias")),
    "qk_offset_scale.gamma": TensorEntry(("gamma",)),
    "qk_offset_scale.beta": TensorEntry(("beta",)),
    "rel_pos_bias.relative_attention_bias.weight": TensorEntry(("relative_bias",)),
    "to_out.weight": kernel("out"),
    "to_out.bias": TensorEntry(("out", "bias")),
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
    given = ConfigFields(config, "FLASH", REQUIRED)
    options: dict[str, Any] = {}
    for there, here in FIELDS.items():
        if there not in given:
            continue
        default = getattr(FlashConfig, here)
        if isinstance(default, bool):
            options[here] = given.flag(there, default)
        elif isinstance(default, float):
            options[here] = given.number(there, default)
        elif isinstance(default, str):
            options[here] = given.text(there, default)
        else:
            options[here] = given.size(there)
    return FlashConfig(**options, attention=attention or AttentionConfig(name="flash"))


def config_to_huggingface(config: FlashConfig, architecture: str = "FlashForCausalLM") -> dict[str, Any]:
    """The contents of a `config.json`; `architecture` names the kind of model that has the configuration."""
    common = {
        "model_type": MODEL_TYPE,
        "architectures": [architecture],
        "torch_dtype": config.param_dtype,
        # Said, for transformers 4 takes the head to be the embedding where nothing is.
        "tie_word_embeddings": False,
    }
    return common | {there: getattr(config, here) for there, here in FIELDS.items()}


def entries(model: Flash | FlashEncoder) -> Entries:
    """Entries of all tensors of a model, by name."""
    stack = ("layers", "layers")
    # A unit is its own attention: its mixer's names have nothing before them.
    mixer = {name.removeprefix("."): entry for name, entry in mixer_entries(model, stack, ("mixer",), "").items()}
    layer = NORMS[model.config.norm] | LAYER | mixer
    return present(model, TOP | stacked("layers", layer, stack, model.config.num_layers))


def ignored(name: str) -> bool:
    """True for tensors that are not read: frequencies that follow from the sizes."""
    return name.endswith(DERIVED)


def own_tensors(model: Flash | FlashEncoder, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model: all but those that are ignored."""
    del model
    return {name: tensor for name, tensor in plain_names(tensors).items() if not ignored(name)}


def read_flash(model: Flash | FlashEncoder, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))
