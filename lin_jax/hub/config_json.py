"""Model configurations from and to `config.json`: the family's Hugging Face fields and, if linearized, `attention`.

`attention` holds every field of `AttentionConfig`; in a model whose layers differ, a list of such objects, one for each
layer; in a model with several kinds of attention (T5), one object for each of them: `encoder`, `decoder` and `cross`.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from flax import nnx

from lin_jax.attention import AttentionConfig, parse_name
from lin_jax.attention.registry import Name
from lin_jax.errors import UserError
from lin_jax.hub.export import architectures, auto_map, has_source
from lin_jax.hub.families.registry import Family, family_of_model, family_of_type
from lin_jax.hub.int8.matrices import module_patterns, output_axes
from lin_jax.hub.int8.tensor import FIELD
from lin_jax.json_files import LARGEST_ID, short

Attentions = str | AttentionConfig | Mapping[str, AttentionConfig]
_SUFFIX = "_attention"


def attentions_of(config: Any) -> dict[str, AttentionConfig]:
    """Every attention of a model's configuration by name; if it has but one, the name is empty."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    return {
        "" if name == "attention" else name.removesuffix(_SUFFIX): value
        for name, value in found.items()
        if isinstance(value, AttentionConfig)
    }


def is_softmax(config: Any) -> bool:
    """True if a model's configuration has softmax attention alone, of whole texts or of a window."""
    every = [kind for each in attentions_of(config).values() for kind in each.kinds]
    return all(parse_name(each.name) == Name("softmax", False, False) for each in every)


def is_known(family: Family, config: Any) -> bool:
    """True if transformers has a model with this configuration: of softmax attention, windowed where it can be."""
    return family.known and is_softmax(config) and family.has_windows(config)


def model_config(family: Family, hf_config: Mapping[str, Any], attention: Attentions | None = None) -> Any:
    """The model configuration of the contents of a `config.json`.

    Args:
        family: the model's.
        hf_config: contents of the file.
        attention: replaces that of the file; for a model with several, one for all or some of them by name.

    Raises:
        UserError: the family has no such model, or an attention is named that it does not have.
    """
    if hf_config.get("quantization_config") is not None and hf_config["quantization_config"] != {}:
        raise UserError("the checkpoint is quantized (quantization_config); give one that is not")
    if isinstance(attention, str | list | tuple | AttentionConfig):
        return family.config_from_huggingface(hf_config, AttentionConfig.of(attention))
    stored = _read_attentions(hf_config.get("attention"))
    if not isinstance(stored, Mapping):
        config = family.config_from_huggingface(hf_config, stored)
    else:
        config = _with_attentions(family, family.config_from_huggingface(hf_config, None), stored)
    return config if attention is None else _with_attentions(family, config, attention)


def _with_attentions(family: Family, config: Any, attentions: Mapping[str, AttentionConfig]) -> Any:
    known = attentions_of(config)
    if unknown := [name for name in attentions if name not in known or not name]:
        names = ", ".join(name for name in known if name) or "only one attention, without a name"
        raise UserError(f"attention '{unknown[0]}' is unknown for a {family.name}; it has {names}")
    return replace(config, **{name + _SUFFIX: value for name, value in attentions.items()})


def config_json(model: nnx.Module, *, int8: bool = False) -> dict[str, Any]:
    """The contents of a model's `config.json`.

    Args:
        model: the model, which may be abstract.
        int8: whether its matrices are rounded, which transformers has no model with.
    """
    family = family_of_model(model)
    architecture = family.head_of(model).architectures[0]
    config = model.config
    hf_config = family.config_to_huggingface(config, architecture)
    if is_known(family, config) and not int8:
        return hf_config
    attentions = {name: _stored_attention(attention, config) for name, attention in attentions_of(config).items()}
    hf_config |= {
        "base_model_type": hf_config["model_type"],
        "model_type": family.own_type,
        **family.linearized_options(config),
        "attention": attentions.get("", attentions),
    }
    if int8:
        hf_config[FIELD] = module_patterns(output_axes(model, family.entries(model)))
    if has_remote_code(model, int8=int8):
        name = type(model).__name__
        hf_config |= {"architectures": architectures(family.name, name), "auto_map": auto_map(family.name, name)}
    return hf_config


def _stored_attention(attention: AttentionConfig, config: Any) -> dict[str, Any] | list[dict[str, Any]]:
    """The fields of an attention, or of each layer's, where they differ."""
    if attention.pattern is None and attention.layers is None:
        return _attention_fields(attention)
    return [_attention_fields(each) for each in attention.of_layers(config.num_layers)]


def _attention_fields(attention: AttentionConfig) -> dict[str, Any]:
    """All fields of one layer's attention but `implementation`, which is this machine's choice of kernels."""
    left = ("implementation", "pattern", "layers")
    # Readers of earlier versions know no window, or no sinks.
    newer = {"window": None, "sinks": 0, "rotary_memory": True}
    return {
        name: value
        for name, value in asdict(attention).items()
        if name not in left and not (name in newer and value == newer[name])
    }


def has_remote_code(model: nnx.Module, *, int8: bool = False) -> bool:
    """True if a model is saved with PyTorch code of its own for transformers: some families, linearized or in int8."""
    family = family_of_model(model)
    if (is_known(family, model.config) and not int8) or not can_decode(model.config):
        return False
    bases = {parse_name(kind.name).base for each in attentions_of(model.config).values() for kind in each.kinds}
    return has_source(family.name, type(model).__name__, bases)


def can_decode(config: Any) -> bool:
    """False if scores are divided by the length of a row that decoding does not know: in some FLASHs."""
    if getattr(config, "length_scale", "position") == "position":
        return True
    return not any(parse_name(kind.name).base in ("softmax", "square") for kind in config.attention.kinds)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        UserError: the file names none, or an unknown one.
    """
    if hf_config.get("model_type") is None:
        raise UserError("config.json has no model_type; give the folder of a Hugging Face checkpoint")
    return family_of_type(hf_config["model_type"])


def _read_attentions(stored: Any) -> AttentionConfig | dict[str, AttentionConfig] | None:
    if stored is None:
        return None
    if isinstance(stored, dict) and stored and all(isinstance(value, dict) for value in stored.values()):
        return {name: _read_attention(value) for name, value in stored.items()}
    if isinstance(stored, list) and stored:
        return AttentionConfig.of([_read_attention(each) for each in stored])
    return _read_attention(stored)


def _read_attention(stored: Any) -> AttentionConfig:
    if not isinstance(stored, dict):
        raise UserError(f"attention {stored!r} in config.json is not an object; give one with an attention's fields")
    if unknown := sorted(set(stored) - {each.name for each in fields(AttentionConfig)}):
        raise UserError(f"attention.{unknown[0]} in config.json is unknown; a newer lin_jax may have written it")
    _check_types(stored)
    return AttentionConfig(**stored)


def _check_types(stored: Mapping[str, Any]) -> None:
    plain = asdict(AttentionConfig())
    for name, value in stored.items():
        if name in ("pattern", "layers"):
            continue  # Their entries are checked as they are read.
        kind = type(plain[name]) if plain[name] is not None else str if name == "implementation" else int
        if value is None and plain[name] is None:
            continue
        fits = isinstance(value, int | float) and not isinstance(value, bool) if kind is float else type(value) is kind
        if not fits or (isinstance(value, int | float) and not abs(value) <= LARGEST_ID):
            raise UserError(
                f"attention in config.json has a value of a wrong type or size: {name} is {short(value)}; "
                f"give one like {short(plain[name])}"
            )
