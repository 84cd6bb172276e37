"""LLaMA checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.tensors import Entries, Entry, convolution, fill, kernel, named, present, stacked, transpose
from lin_jax.models import Llama, LlamaConfig, MedusaHeads, RotaryConfig


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {
    EMBEDDING: Entry(("embed", "embedding")),
    "model.norm.weight": Entry(("norm", "scale")),
    HEAD: kernel("head"),
}
LAYER = {
    "input_layernorm.weight": Entry(("attention_norm", "scale")),
    "post_attention_layernorm.weight": Entry(("feed_forward_norm", "scale")),
    "self_attn.q_proj.weight": kernel("attention", "query"),
    "self_attn.k_proj.weight": kernel("attention", "key"),
    "self_attn.v_proj.weight": kernel("attention", "value"),
    "self_attn.o_proj.weight": kernel("attention", "out"),
    "self_attn.global_factor": Entry(("attention", "mixer", "alpha")),
    "self_attn.dwconv.weight": convolution("attention", "mixer", "convolution"),
    "mlp.gate_proj.weight": kernel("feed_forward", "gate"),
    "mlp.up_proj.weight": kernel("feed_forward", "up"),
    "mlp.down_proj.weight": kernel("feed_forward", "down"),
}
HEADS = {
    "0.linear.weight": Entry(("weight",), transpose, transpose),
    "0.linear.bias": Entry(("bias",)),
    "1.weight": Entry(("output",), transpose, transpose),
}


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> LlamaConfig:
    """A LLaMA configuration from the contents of a `config.json`, with the given attention (default softmax).

    Raises:
        UserError: a size is missing, or an option is set that this model does not have.
    """
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the configuration has no {', '.join(missing)}; give the config.json of a LLaMA")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act '{config['hidden_act']}' is not supported in a LLaMA; only 'silu' is")
    for option in ("attention_bias", "mlp_bias"):
        if config.get(option):
            raise UserError(f"{option} is set in the configuration; a LLaMA with biases is not supported")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False),
        rotary=rotary_from_huggingface(config),
        attention=attention or AttentionConfig(name="softmax"),
    )


def rotary_from_huggingface(config: Mapping[str, Any]) -> RotaryConfig:
    """Rotary options from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    options = {name: value for part in (beside, given) for name, value in part.items() if value is not None}
    theta = options.pop("rope_theta", 10000.0)
    scaling = options.pop("rope_type", options.pop("type", "default"))
    trained = config.get("max_position_embeddings", 2048)
    original = options.pop("original_max_position_embeddings", trained)
    if scaling == "dynamic":
        original = trained  # In the dynamic scaling the limit is the pretraining length itself.
    elif scaling in ("llama3", "yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or original
    if scaling == "default":
        options.pop("partial_rotary_factor", None)  # Hugging Face's LLaMA does not heed it either.
    if options.get("factor") is None:
        options["factor"] = 1.0 if scaling in ("default", "proportional") else trained / original
    for name in ("short_factor", "long_factor"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    unknown = sorted(set(options) - set(RotaryConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"rotary option '{unknown[0]}' in the configuration is unknown")
    return RotaryConfig(theta, scaling, original_context_length=original, context_length=trained, **options)


def read_llama(model: Llama, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a model, which may be one of shapes, with named tensors.

    Two kinds of tensors may be there beside the model's own: the embedding once more as a tied head, and the rotary
    frequencies that old checkpoints hold.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    if model.head is None and np.array_equal(own.get(HEAD, ()), own.get(EMBEDDING, ())):
        own.pop(HEAD, None)
    fill(model, entries(model), own)


def read_heads(heads: MedusaHeads, tensors: Mapping[str, np.ndarray]) -> None:
    """Like `read_llama`, for Medusa heads: tensors named `M.0.linear.weight`, `M.0.linear.bias` and `M.1.weight`."""
    fill(
        heads,
        {f"{m}.{name}": entry.of_layer((), m) for m in range(heads.count) for name, entry in HEADS.items()},
        tensors,
    )


def write_llama(state: nnx.State, model: Llama) -> dict[str, np.ndarray]:
    """Named tensors of a state that is shaped like the model's parameters (the parameters, or their gradients)."""
    return named(state, entries(model))


def entries(model: Llama) -> Entries:
    """Every tensor that this model has, by name."""
    return present(model, TOP | stacked("model.layers", LAYER, ("layers", "layers"), model.config.num_layers))
