"""LLaMA checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.mixers import mixer_entries
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, named, present, stacked, without_copy
from lin_jax.models import Llama, LlamaConfig, RotaryConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {
    EMBEDDING: TensorEntry(("embed", "embedding")),
    "model.norm.weight": TensorEntry(("norm", "scale")),
    HEAD: kernel("head"),
}
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
LAYER = {
    "input_layernorm.weight": TensorEntry(("attention_norm", "scale")),
    "post_attention_layernorm.weight": TensorEntry(("feed_forward_norm", "scale")),
    **{f"self_attn.{there}.weight": kernel("attention", here) for there, here in PROJECTIONS.items()},
    **{f"self_attn.{there}.bias": TensorEntry(("attention", here, "bias")) for there, here in PROJECTIONS.items()},
    "self_attn.q_norm.weight": TensorEntry(("attention", "query_norm", "scale")),
    "self_attn.k_norm.weight": TensorEntry(("attention", "key_norm", "scale")),
    "mlp.gate_proj.weight": kernel("feed_forward", "gate"),
    "mlp.up_proj.weight": kernel("feed_forward", "up"),
    "mlp.down_proj.weight": kernel("feed_forward", "down"),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Defaults of transformers for options that a config.json leaves out, as far as the types differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False, "max_position_embeddings": 32768},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
    },
}


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> LlamaConfig:
    """A configuration from the contents of a `config.json` of a LLaMA, Mistral, Qwen2 or Qwen3.

    Args:
        config: contents of the file. In that of a linearized model, `base_model_type` is one of these types, and
            `output_bias` and `query_key_norm` are its options.
        attention: the token mixer; None is softmax.

    Raises:
        UserError: a size is missing, or an option is set that this model does not have.
    """
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the configuration has no {', '.join(missing)}; give the config.json of a LLaMA")
    kind = config.get("base_model_type") or config.get("model_type", "llama").removeprefix("lin_jax_")
    config = DEFAULTS.get(kind, {}) | dict(config)
    _refuse_options(config)
    biases = bool(config.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        attention_bias=kind == "qwen2" or (kind != "mistral" and biases),
        output_bias=config.get("output_bias", kind in ("llama", "qwen3") and biases),
        query_key_norm=config.get("query_key_norm", kind == "qwen3"),
        tie_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
        rotary=rotary_from_huggingface(config),
        attention=attention or AttentionConfig(name="softmax"),
    )


def _refuse_options(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act '{config['hidden_act']}' is not supported in a LLaMA; only 'silu' is")
    if config.get("mlp_bias"):
        raise UserError(
            "mlp_bias is set in the configuration; a LLaMA with biases in its feed-forward is not supported"
        )
    window, length = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    windowed = config.get("use_sliding_window", True) and set(config.get("layer_types") or ("",)) != {"full_attention"}
    if window is not None and window < length and windowed:
        raise UserError(
            f"sliding_window is {window} of max_position_embeddings {length}; windowed attention is not supported, "
            "set sliding_window to null to attend to everything"
        )


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The contents of a `config.json`, of the transformers type that has the configuration's options.

    Raises:
        UserError: no type has them all.
    """
    kind, architecture = _type_of(config)
    return {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **rotary_to_huggingface(config.rotary),
        "torch_dtype": config.param_dtype,
    }


def linearized_options(config: LlamaConfig) -> dict[str, Any]:
    """Options in the `config.json` of a linearized model that transformers' own types imply."""
    return {"output_bias": config.output_bias, "query_key_norm": config.query_key_norm}


def _type_of(config: LlamaConfig) -> tuple[str, str]:
    """The transformers type that has these options, and its class."""
    if config.attention_bias == config.output_bias:
        return ("qwen3", "Qwen3ForCausalLM") if config.query_key_norm else ("llama", "LlamaForCausalLM")
    if config.attention_bias and not config.query_key_norm:
        return "qwen2", "Qwen2ForCausalLM"
    raise UserError(
        f"no model of transformers has model.attention_bias {config.attention_bias}, model.output_bias "
        f"{config.output_bias} and model.query_key_norm {config.query_key_norm}; set both biases alike"
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
        raise UserError(
            f"rotary option '{unknown[0]}' in the configuration is unknown; a newer transformers may have written it"
        )
    return RotaryConfig(theta, scaling, original_context_length=original, context_length=trained, **options)


# Options of each scaling in a file; those that are None are left out, and the reader takes its default.
_ROTARY_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}


def rotary_to_huggingface(rotary: RotaryConfig) -> dict[str, Any]:
    """Rotary options as fields of a `config.json`.

    Readers from before transformers 5 know `rope_theta` and `rope_scaling`, and the original length of `longrope`
    beside them.

    Raises:
        UserError: `dynamic` is set for a longer text than in pretraining, which has no field.
    """
    original, length = rotary.original_context_length, rotary.context_length or rotary.original_context_length
    if rotary.scaling == "dynamic" and length > original:
        raise UserError(
            f"rotary.context_length {length} of a dynamic scaling has no place in a config.json; "
            f"leave it at {original}, that of pretraining"
        )
    values = {name: getattr(rotary, name) for name in _ROTARY_OPTIONS[rotary.scaling]}
    scaling = {"rope_type": rotary.scaling} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }
    if rotary.scaling in ("yarn", "longrope", "llama3"):
        scaling["original_max_position_embeddings"] = original
    said = {
        "max_position_embeddings": length,
        "rope_theta": rotary.theta,
        "rope_parameters": scaling | {"rope_theta": rotary.theta},
    }
    if rotary.scaling != "default":
        said["rope_scaling"] = scaling
    if rotary.scaling == "longrope":
        said["original_max_position_embeddings"] = original
    return said


def entries(model: Llama) -> Entries:
    """Entries of all tensors of a model, by name."""
    stack = ("layers", "layers")
    mixer = mixer_entries(model, stack, ("attention", "mixer"), "self_attn")
    return present(model, TOP | stacked("model.layers", LAYER | mixer, stack, model.config.num_layers))


def ignored(name: str) -> bool:
    """True for tensors that are not read: rotary frequencies of old checkpoints."""
    return name.endswith(".rotary_emb.inv_freq")


def own_tensors(model: Llama, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model: without ignored ones and a copy of the embedding as a tied head."""
    own = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
    return own if model.head is not None else without_copy(own, HEAD, EMBEDDING)


def read_llama(model: Llama, tensors: Mapping[str, Any]) -> None:
    """Fills a model, which may be abstract, with named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    fill(model, entries(model), own_tensors(model, tensors))


def write_llama(state: Any, model: Llama) -> dict[str, np.ndarray]:
    """Named tensors of a state that is shaped like the model's parameters (the parameters, or their gradients)."""
    return named(state, entries(model))
