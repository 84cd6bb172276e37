"""The GPT-2 and FLASH models that golden files belong to."""

from dataclasses import replace

from flax import nnx
from support.golden_files import Golden

from lin_jax.attention import AttentionConfig
from lin_jax.hub.families import flash as flash_names
from lin_jax.hub.families import gpt2 as gpt2_names
from lin_jax.hub.families.flash import read_flash
from lin_jax.hub.families.gpt2 import read_gpt2
from lin_jax.models import Flash, FlashConfig, FlashEncoder, Gpt2, Gpt2Classifier

SCORE = "score.weight"
# Fields of the published FLASH's configuration, by ours.
FLASH_FIELDS = {
    "vocab_size": "num_tokens",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "query_key_size": "query_key_dim",
    "expansion_factor": "expansion_factor",
    "shift_tokens": "shift_tokens",
    "relative_buckets": "relpos_num_buckets",
    "relative_max_distance": "relpos_max_distance",
}


def attention(golden: Golden) -> AttentionConfig:
    """The token mixer that the settings describe."""
    settings = golden.settings
    for name in ("softmax", "square"):
        if settings.get(name):
            return AttentionConfig(name)
    name = {
        (True, False): "flash_local",
        (False, True): "flash_global",
        (True, True): "flash_global+local" if settings.get("alpha") else "flash",
    }[settings["local"], settings["global"]]
    if settings.get("castling"):
        name = "linear_angular"
    return AttentionConfig(
        name + ("+convolution" if settings.get("conv") else ""),
        group_size=golden.config["group_size"],
        kernel_size=golden.config.get("kernel_size") or golden.config.get("kernel") or 1,
        local_score="laplace" if settings.get("laplace_attn_fn") else "relu_squared",
        convolve_padding=True,
    )


def gpt2(golden: Golden, dtype: str) -> Gpt2:
    """The language model with the file's weights, in the given type."""
    config = gpt2_names.config_from_huggingface(golden.config, attention(golden))
    config = replace(config, dtype=dtype, param_dtype=dtype)
    model = nnx.eval_shape(lambda: Gpt2(config, rngs=nnx.Rngs(0)))
    read_gpt2(model, {name: value for name, value in golden.weights.items() if name != SCORE})
    return model


def gpt2_classifier(golden: Golden, dtype: str) -> Gpt2Classifier:
    """The classifier on the same trunk."""
    config = replace(gpt2(golden, dtype).config, num_labels=golden.config["num_labels"])
    model = nnx.eval_shape(lambda: Gpt2Classifier(config, rngs=nnx.Rngs(0)))
    read_gpt2(model, golden.weights)
    return model


def flash_config(golden: Golden, dtype: str) -> FlashConfig:
    """Sizes and options, with scores that are divided by the row's length, as published."""
    fields = {ours: golden.config[theirs] for ours, theirs in FLASH_FIELDS.items()}
    norm = golden.config["norm_type"].removesuffix("norm")
    fields |= {"norm": norm, "norm_eps": golden.config[f"{norm}norm_eps"], "length_scale": "row"}
    config = flash_names.config_from_huggingface(fields, attention(golden))
    return replace(config, dtype=dtype, param_dtype=dtype)


def flash(golden: Golden, dtype: str) -> Flash | FlashEncoder:
    """The language model or the encoder with the file's weights, in the given type."""
    config, kind = flash_config(golden, dtype), Flash if golden.settings["causal"] else FlashEncoder
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    read_flash(model, golden.weights)
    return model
