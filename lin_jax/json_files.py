"""JSON files that others wrote: with a byte-order mark or not, bounded in size and nesting, null as absent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError

# The largest index of a published model has nine million bytes.
LARGEST = 64 * 2**20
DEEPEST = 64
# Options of which null says something else than their absence: no window, as many heads as for queries, the usual size.
NULL_IS_A_VALUE = ("sliding_window", "num_key_value_heads", "head_dim")
# The largest number that an index of a tensor or a token is stored in.
LARGEST_ID = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object of a JSON file.

    Raises:
        UserError: the file is no JSON, too large, nested too deeply, or holds no object.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise UserError(f"{path} has {size:,} bytes, of at most {LARGEST:,} for a file of settings; restore it")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path} is nested more than {DEEPEST} levels deep; restore it") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; restore it")
    if _is_deeper(content, DEEPEST):
        raise UserError(f"{path} is nested more than {DEEPEST} levels deep; restore it")
    return content


def without_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set: null stands for an absent one, where it is not a value of its own."""
    return {name: value for name, value in content.items() if value is not None or name in NULL_IS_A_VALUE}


def token_ids(content: Mapping[str, Any], name: str, file: str) -> tuple[int, ...]:
    """The ids of an option that holds a token, a list of them, or nothing.

    Args:
        content: the options.
        name: of the option.
        file: name of the file, for the message.

    Raises:
        UserError: something in it is no id.
    """
    value = content.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= LARGEST_ID:
            raise UserError(f"{name} {short(value)} in {file} is no token; give its id, a list of ids, or null")
    return tuple(ids)


def short(value: Any) -> str:
    """A value as it stands in a message: on one line, and cut."""
    text = json.dumps(value) if isinstance(value, str | int | float | list | dict | None) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_deeper(content: Any, levels: int) -> bool:
    """True if objects and lists are nested deeper than so many levels; without recursion."""
    level = [content]
    for _ in range(levels + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
