"""LLaMA checkpoints: Hugging Face's configuration and tensor names, and the published names of its linear attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lin_jax.attention import AttentionConfig, softmax_window
from lin_jax.errors import UserError
from lin_jax.hub.families.config_fields import ConfigFields
from lin_jax.hub.families.mixers import layer_entries
from lin_jax.hub.families.tensor_names import plain_names, rooted
from lin_jax.hub.tensors import Entries, TensorEntry, fill, kernel, named, present, without_copy
from lin_jax.json_files import short, without_nulls
from lin_jax.models import Llama, LlamaConfig, RotaryConfig
from lin_jax.models.rotary import SCALINGS

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
LARGEST_HEAD = 2**16
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FULL, SLIDING = "full_attention", "sliding_attention"
# Beyond any model; a number that stands in a file is not to fill the memory.
MOST_LAYERS = 2**16
# Defaults of transformers for options that a config.json leaves out, as far as the types differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
}


def config_from_huggingface(config: Mapping[str, Any], attention: AttentionConfig | None = None) -> LlamaConfig:
    """A configuration from the contents of a `config.json` of a LLaMA, Mistral, Qwen2 or Qwen3.

    Args:
        config: contents of the file. In that of a linearized model, `base_model_type` is one of these types, and
            `output_bias` and `query_key_norm` are its options.
        attention: the token mixer; None is softmax, with the windows that the file says.

    Raises:
        UserError: a size is missing, or an option is set that this model does not have.
    """
    kind = kind_of(config)
    given = ConfigFields(DEFAULTS.get(kind, {}) | without_nulls(config), "LLaMA", REQUIRED)
    _refuse_options(given)
    biases = given.flag("attention_bias", False)
    attention = attention or softmax_of(given, kind)
    found = LlamaConfig(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("hidden_size"),
        intermediate_size=given.size("intermediate_size"),
        num_layers=given.size("num_hidden_layers"),
        num_heads=given.size("num_attention_heads"),
        num_kv_heads=_kv_heads(config, given),
        head_dim=given.optional_size("head_dim"),
        norm_eps=given.number("rms_norm_eps", 1e-6),
        attention_bias=kind == "qwen2" or (kind != "mistral" and biases),
        output_bias=given.flag("output_bias", kind in ("llama", "qwen3") and biases),
        query_key_norm=given.flag("query_key_norm", kind == "qwen3"),
        tie_embeddings=given.flag("tie_word_embeddings", False),
        initializer_range=given.number("initializer_range", 0.02),
        rotary=rotary_from_huggingface(given.content),
        attention=attention,
    )
    _check_frequencies(found)
    return found


def _check_frequencies(config: LlamaConfig) -> None:
    """Refuses options that are numbers each, and together give frequencies that are none."""
    if config.head_size > LARGEST_HEAD:
        raise UserError(f"a head has size {config.head_size} in the configuration; give at most {LARGEST_HEAD}")
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = SCALINGS[config.rotary.scaling](config.rotary, config.head_size)
    except ArithmeticError:
        frequencies, factor = np.full(1, np.nan), 1.0
    except UserError:
        return  # Too few divisors, which are counted where the rotation is needed.
    if not np.isfinite([*frequencies, factor]).all():
        raise UserError(
            f"the rotary options of the configuration ({config.rotary.scaling}) give frequencies that are no numbers; "
            "correct rope_theta and rope_scaling"
        )


def kind_of(config: Mapping[str, Any]) -> str:
    """The transformers type of a configuration; that of the base, in a linearized model's."""
    given = ConfigFields(config, "LLaMA")
    return given.text("base_model_type", given.text("model_type", "llama").removeprefix("lin_jax_"))


def _kv_heads(config: Mapping[str, Any], given: ConfigFields) -> int | None:
    """The key/value heads; None, as many as there are heads, also where the type's default cannot be meant."""
    found, heads = given.optional_size("num_key_value_heads"), given.size("num_attention_heads")
    # The shapes of the tensors are compared with it in any case.
    return None if "num_key_value_heads" not in config and found is not None and heads % found else found


def softmax_of(given: ConfigFields, kind: str) -> AttentionConfig:
    """Softmax attention as a configuration of a transformers type has it: of whole texts, or of a window, by layer.

    Raises:
        UserError: `layer_types` or `max_window_layers` is none of a model with these layers.
    """
    full, count = AttentionConfig("softmax"), given.size("num_hidden_layers")
    window, kinds = given.optional_size("sliding_window"), given.content.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(each, str) for each in kinds)):
        raise UserError(f"layer_types is {short(kinds)} in the configuration; give a list of names")
    if kind == "mistral":
        # Of all layers: transformers does not heed layer_types either.
        return AttentionConfig("softmax", window=window)
    if kind not in ("qwen2", "qwen3"):
        return full
    sliding = AttentionConfig("softmax", window=window if given.flag("use_sliding_window", False) else None)
    if kinds is not None:
        return _softmax_of_types(kinds, count, full, sliding)
    first = given.content.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= MOST_LAYERS:
        raise UserError(f"max_window_layers is {short(first)} in the configuration; give the number of the first layer")
    if sliding == full or first >= count:
        return full
    return replace(sliding, layers={number: full for number in range(first)} or None)


def _softmax_of_types(kinds: Any, count: int, full: AttentionConfig, sliding: AttentionConfig) -> AttentionConfig:
    if not all(kind in (FULL, SLIDING) for kind in kinds):
        raise UserError(f"layer_types is {short(kinds)} in the configuration; give a list of {FULL} and {SLIDING}")
    if SLIDING not in kinds:
        return full
    if len(kinds) != count:
        raise UserError(f"layer_types names {len(kinds)} layers in the configuration, which has {count}; name each")
    if sliding == full:
        raise UserError(f"layer_types names {SLIDING} without a window; set use_sliding_window and sliding_window")
    return AttentionConfig(pattern=[sliding if kind == SLIDING else full for kind in kinds])


def remarks(config: Mapping[str, Any], model_config: LlamaConfig) -> list[str]:
    """Lines about options of a `config.json` that are read another way than they stand there."""
    kind = kind_of(config)
    given = ConfigFields(DEFAULTS.get(kind, {}) | without_nulls(config), "LLaMA")
    lines = []
    if ignored := ignored_rotary_options(given.content):
        lines.append(f"rotary options {', '.join(ignored)} in config.json are not heeded, as in transformers")
    windows = {each.window for each in softmax_of(given, kind).kinds if each.window is not None}
    if windows - {softmax_window(each) for each in model_config.attention.kinds}:
        lines.append(f"sliding_window {max(windows)} in config.json falls away with the attention that is replaced")
    return lines


def _refuse_options(given: ConfigFields) -> None:
    activation = given.text("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"hidden_act '{activation}' is not supported in a LLaMA; only 'silu' is")
    if given.flag("mlp_bias", False):
        raise UserError(
            "mlp_bias is set in the configuration; a LLaMA with biases in its feed-forward is not supported"
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
        **_window_options(config, kind),
        "torch_dtype": config.param_dtype,
    }


def linearized_options(config: LlamaConfig) -> dict[str, Any]:
    """Options in the `config.json` of a linearized model that transformers' own types imply."""
    return {"output_bias": config.output_bias, "query_key_norm": config.query_key_norm}


def has_windows(config: LlamaConfig) -> bool:
    """True if a type of transformers has the windows of a configuration's softmax attention, without sinks."""
    windows = _windows(config)
    if any(each.sinks for each in config.attention.kinds):
        return False
    if set(windows) == {None}:
        return True
    if len(set(windows) - {None}) > 1:
        return False
    biases = config.attention_bias, config.output_bias
    if config.query_key_norm or biases == (True, False):
        return not config.query_key_norm or biases[0] == biases[1]
    return None not in windows and biases == (False, False)


def _windows(config: LlamaConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(softmax_window(each) for each in config.attention.of_layers(config.num_layers))


def _window_options(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """The windows of softmax attention, as a type of transformers has them."""
    windows = _windows(config)
    found = set(windows) - {None}
    if not found or not has_windows(config):
        return {}
    if kind == "mistral":
        return {"sliding_window": windows[0]}
    return {
        "use_sliding_window": True,
        "sliding_window": found.pop(),
        "max_window_layers": next(number for number, window in enumerate(windows) if window is not None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def _type_of(config: LlamaConfig) -> tuple[str, str]:
    """The transformers type that has these options, and its class."""
    if config.attention_bias == config.output_bias:
        if config.query_key_norm:
            return "qwen3", "Qwen3ForCausalLM"
        if None not in _windows(config) and has_windows(config):
            return "mistral", "MistralForCausalLM"
        return "llama", "LlamaForCausalLM"
    if config.attention_bias and not config.query_key_norm:
        return "qwen2", "Qwen2ForCausalLM"
    raise UserError(
        f"no model of transformers has model.attention_bias {config.attention_bias}, model.output_bias "
        f"{config.output_bias} and model.query_key_norm {config.query_key_norm}; set both biases alike"
    )


def rotary_from_huggingface(config: Mapping[str, Any]) -> RotaryConfig:
    """Rotary options from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    Raises:
        UserError: an option has a value that no rotation has, or the frequencies are no numbers.
    """
    given = ConfigFields(config, "LLaMA")
    options = ConfigFields(_rotary_options(given), "LLaMA")
    scaling = options.text("rope_type", options.text("type", "default"))
    trained = given.size("max_position_embeddings", 2048)
    original = options.size("original_max_position_embeddings", trained)
    if scaling == "dynamic":
        original = trained  # In the dynamic scaling the limit is the pretraining length itself.
    elif scaling in ("llama3", "yarn", "longrope"):
        original = given.size("original_max_position_embeddings", original)
    factor = 1.0 if scaling in ("default", "proportional") else trained / original
    for name in ignored_rotary_options(given.content):
        if isinstance(options.content[name], dict):
            raise UserError(
                f"rotary option '{name}' is an object in the configuration; one for all layers is supported"
            )
    found: dict[str, Any] = {name: options.numbers(name) for name in ("short_factor", "long_factor")}
    found |= {name: options.number(name, 0.0) for name in _ROTARY_NUMBERS if name in options}
    if scaling == "default":
        found.pop("partial_rotary_factor", None)  # Hugging Face's LLaMA does not heed it either.
    return RotaryConfig(
        theta=options.number("rope_theta", 10000.0, above=1.0),
        scaling=scaling,
        factor=options.number("factor", factor),
        original_context_length=original,
        context_length=trained,
        truncate=options.flag("truncate", True),
        **found,
    )


def ignored_rotary_options(config: Mapping[str, Any]) -> list[str]:
    """Names of rotary options that are not heeded, here as in transformers."""
    known = {*_ROTARY_NUMBERS, "rope_theta", "rope_type", "type", "factor", "truncate", "short_factor", "long_factor"}
    return sorted(set(_rotary_options(ConfigFields(config, "LLaMA"))) - known - {"original_max_position_embeddings"})


def _rotary_options(given: ConfigFields) -> dict[str, Any]:
    inside = given.part("rope_scaling") or given.part("rope_parameters")
    beside = {name: given.content.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    options = {name: value for part in (beside, inside) for name, value in part.items() if value is not None}
    # Zero weights in yarn's factor say that there are none.
    return {name: value for name, value in options.items() if value != 0 or not name.startswith("mscale")}


_ROTARY_NUMBERS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
)
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
    return present(model, TOP | layer_entries(model, LAYER, ("layers",), "model.layers", "self_attn"))


def ignored(name: str) -> bool:
    """True for tensors that are not read: rotary frequencies of old checkpoints."""
    return name.endswith(".rotary_emb.inv_freq")


def own_tensors(model: Llama, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the checkpoint's tensors for a model, under its names: those of a trunk alone lack `model.`.

    Ignored tensors are left out, and so is a second copy of the embedding as a tied head.
    """
    rooted_tensors = rooted(plain_names(tensors), "model.", "embed_tokens.weight", ("lm_head.", "score."))
    own = {name: tensor for name, tensor in rooted_tensors.items() if not ignored(name)}
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
