"""Options of a `config.json` by name and type; null is absent, and a value that no model has is refused."""

import math
from collections.abc import Mapping
from typing import Any

from lin_jax.errors import UserError
from lin_jax.json_files import LARGEST_ID, short, token_ids, without_nulls


class ConfigFields:
    """Reader of the options of a `config.json`.

    Args:
        content: contents of the file, or of an object in it.
        owner: name of the family, for messages.
        required: sizes that must be there.

    Raises:
        UserError: a required size is missing.
    """

    def __init__(self, content: Mapping[str, Any], owner: str, required: tuple[str, ...] = ()) -> None:
        self.content = without_nulls(content)
        if missing := [name for name in required if name not in self.content]:
            raise UserError(f"the configuration has no {', '.join(missing)}; give the config.json of a {owner}")

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    def size(self, name: str, default: int = 0) -> int:
        """A positive whole number.

        Raises:
            UserError: it is none, or too large for an index.
        """
        found = self.optional_size(name)
        return default if found is None else found

    def optional_size(self, name: str) -> int | None:
        """A positive whole number, or None if it is absent; errors as in `size`."""
        if name not in self:
            return None
        value = self.content[name]
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 1 <= value <= LARGEST_ID:
            raise self._refused(name, f"a whole number from 1 to {LARGEST_ID}")
        return int(value)

    def number(self, name: str, default: float, *, above: float = 0.0) -> float:
        """A finite number above a bound.

        Raises:
            UserError: it is none.
        """
        if name not in self:
            return default
        value = self.content[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value) or value <= above:
            raise self._refused(name, f"a number above {above:g}")
        return value

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Positive numbers, or None if they are absent.

        Raises:
            UserError: they are none.
        """
        if name not in self:
            return None
        values = self.content[name]
        if not isinstance(values, list | tuple):
            raise self._refused(name, "a list of positive numbers")
        parts = ConfigFields({f"{name}[{place}]": value for place, value in enumerate(values)}, "")
        if len(parts.content) < len(values):
            raise self._refused(name, "a list of positive numbers")
        return tuple(parts.number(each, 0.0) for each in parts.content)

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            UserError: it is neither.
        """
        value = self.content[name] if name in self else default
        if not isinstance(value, bool):
            raise self._refused(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A text.

        Raises:
            UserError: it is none.
        """
        value = self.content[name] if name in self else default
        if not isinstance(value, str):
            raise self._refused(name, "a text in quotation marks")
        return value

    def part(self, name: str) -> dict[str, Any]:
        """An object inside, empty if it is absent.

        Raises:
            UserError: it is none.
        """
        value = self.content[name] if name in self else {}
        if not isinstance(value, dict):
            raise self._refused(name, "an object in braces")
        return without_nulls(value)

    def token(self, name: str, default: int) -> int:
        """The id of a token, the first of a list; -1 stands for none in old files.

        Raises:
            UserError: it is no id.
        """
        if self.content.get(name) == -1:
            return default
        return next(iter(token_ids(self.content, name, "config.json")), default)

    def labels(self) -> int:
        """The number of classes, by itself or as names.

        Raises:
            UserError: it is none.
        """
        return self.optional_size("num_labels") or len(self.part("id2label")) or 2

    def _refused(self, name: str, wanted: str) -> UserError:
        return UserError(f"{name} is {short(self.content.get(name))} in the configuration; give {wanted}")


def _is_finite(value: float) -> bool:
    """False for infinities, NaN, and whole numbers beyond what a float holds."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
