"""Attentions on a command line: a name, with options behind it, as in `exponential+window/window=16/decay=token`.

Several with commas, as in `augmented,softmax/window=64`, are a pattern over layers.
"""

from dataclasses import fields
from typing import Any

from lin_jax.attention import AttentionConfig, parse_name
from lin_jax.errors import UserError


def attention_of(text: str, **sizes: Any) -> AttentionConfig:
    """Reads a name with options, or several as a pattern over layers.

    Args:
        text: the name, and `/OPTION=VALUE` for each option; a comma between the attentions of a pattern.
        sizes: other values than the defaults for options that are not given.

    Raises:
        UserError: the name is unknown, or an option.
    """
    if "," in text:
        return AttentionConfig(pattern=[attention_of(each, **sizes) for each in text.split(",")])
    name, *options = text.split("/")
    parse_name(name)
    plain = {each.name: each.default for each in fields(AttentionConfig) if each.name != "name"}
    chosen = dict(sizes)
    for option in options:
        key, _, value = option.partition("=")
        if key not in plain:
            raise UserError(f"'{text}' has the option '{key}'; choose among {', '.join(plain)}")
        chosen[key] = _read(text, value, plain[key])
    return AttentionConfig(name, **chosen)


def label(text: str) -> str:
    """The name as code, and its options in words, for a table."""
    name, *options = text.split("/")
    return ", ".join([f"`{name}`", *(option.replace("=", " ") for option in options)])


def _read(text: str, value: str, default: Any) -> Any:
    if isinstance(default, str):
        return value
    try:
        return float(value) if isinstance(default, float) else int(value)
    except ValueError:
        raise UserError(f"'{text}' has the value '{value}'; give a number") from None
