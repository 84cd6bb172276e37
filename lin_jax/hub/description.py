"""What a `config.json` says of a model: the family's own Hugging Face fields and, of a linearized one, `attention`.

`attention` holds every field of `AttentionConfig`; in a model with several kinds of attention (T5), one such object for
each of them: `encoder`, `decoder` and `cross`.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from flax import nnx

from lin_jax.attention import AttentionConfig, parse_name
from lin_jax.errors import UserError
from lin_jax.hub.export import architectures, auto_map
from lin_jax.hub.families import Family, family_of_model, family_of_type

Attentions = AttentionConfig | Mapping[str, AttentionConfig]
SUFFIX = "_attention"


def attentions_of(config: Any) -> dict[str, AttentionConfig]:
    """Every attention of a model's configuration by name; where it has but one, the name is empty."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    return {
        "" if name == "attention" else name.removesuffix(SUFFIX): value
        for name, value in found.items()
        if isinstance(value, AttentionConfig)
    }


def is_softmax(config: Any) -> bool:
    """Whether a model's configuration asks for softmax attention alone, as transformers has it."""
    return all(parse_name(each.name) == ("softmax", False, False) for each in attentions_of(config).values())


def configuration(family: Family, description: Mapping[str, Any], attention: Attentions | None = None) -> Any:
    """The configuration that the contents of a `config.json` describe.

    Args:
        family: the model's.
        description: contents of the file.
        attention: instead of what the file says; for a model with several, one for all or some of them by name.

    Raises:
        UserError: the family cannot be built so; or an attention is named that it does not have.
    """
    if description.get("quantization_config"):
        raise UserError("the checkpoint is quantized (quantization_config); give one that is not")
    if isinstance(attention, AttentionConfig):
        return family.config_from_huggingface(description, attention)
    said = _read_attention(description.get("attention"))
    if isinstance(said, AttentionConfig) or said is None:
        config = family.config_from_huggingface(description, said)
    else:
        config = _with_attentions(family, family.config_from_huggingface(description, None), said)
    return config if attention is None else _with_attentions(family, config, attention)


def _with_attentions(family: Family, config: Any, attentions: Mapping[str, AttentionConfig]) -> Any:
    known = attentions_of(config)
    if unknown := [name for name in attentions if name not in known or not name]:
        names = ", ".join(name for name in known if name) or "only one attention, without a name"
        raise UserError(f"attention '{unknown[0]}' is unknown for a {family.name}; it has {names}")
    return replace(config, **{name + SUFFIX: value for name, value in attentions.items()})


def describe(model: nnx.Module) -> dict[str, Any]:
    """The contents of a model's `config.json`."""
    family = family_of_model(model)
    architecture = family.head_of(model).architectures[0]
    config = model.config
    description = family.config_to_huggingface(config, architecture)
    if family.known and is_softmax(config):
        return description
    attentions = attentions_of(config)
    said = {name: _saying(attention) for name, attention in attentions.items()}
    description |= {
        "base_model_type": description["model_type"],
        "model_type": family.own_type,
        **family.linearized_options(config),
        "attention": said.get("", said),
    }
    if has_remote_code(model):
        description |= {"architectures": architectures(family.name), "auto_map": auto_map(family.name)}
    return description


def _saying(attention: AttentionConfig) -> dict[str, Any]:
    """What an attention is, whatever computes it here."""
    return {name: value for name, value in asdict(attention).items() if name != "implementation"}


def has_remote_code(model: nnx.Module) -> bool:
    """Whether a model goes out with code of its own, for transformers to open it: linearized language models."""
    family = family_of_model(model)
    first = next(iter(family.heads.values())).model
    return family.remote_code and type(model) is first and not is_softmax(model.config)


def family_of(description: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        UserError: it names none, or none that is known.
    """
    if "model_type" not in description:
        raise UserError("config.json has no model_type; give the folder of a Hugging Face checkpoint")
    return family_of_type(description["model_type"])


def _read_attention(said: Any) -> Attentions | None:
    if said is None:
        return None
    if isinstance(said, dict) and said and all(isinstance(value, dict) for value in said.values()):
        return {name: _read_one(value) for name, value in said.items()}
    return _read_one(said)


def _read_one(said: Any) -> AttentionConfig:
    if not isinstance(said, dict):
        raise UserError(f"attention {said!r} in config.json is no object with the fields of an attention")
    if unknown := sorted(set(said) - {each.name for each in fields(AttentionConfig)}):
        raise UserError(f"attention.{unknown[0]} in config.json is unknown; a newer lin_jax may have written it")
    try:
        return AttentionConfig(**said)
    except TypeError as error:
        raise UserError(f"attention in config.json has a value of a wrong kind: {error}") from error
