"""YAML files as mappings of names to values, in which a field of text keeps its text: `output: 007` is no number."""

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import Namespace

from lin_jax.errors import UserError

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
# Far beyond any description of a run; a few aliases of aliases are more than any machine can hold.
_DEEPEST, _MOST = 30, 100_000
_Hints = Mapping[str, Any]
# Folders that `configs` lies in: an installed package, or a working copy.
_RECIPES = Path(__file__).parents[2], Path(__file__).parents[3]
# Texts that the option parser takes for null, quoted or not, and what hides them from it.
_LIKE_NULL, _MARK = ("null", "Null", "NULL", "~"), "\x01"


class _Loader(yaml.SafeLoader):
    """Reads plain values, and refuses a key that stands twice, of which YAML would drop one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# Numbers as YAML 1.2 and JSON have them, which YAML 1.1 takes for words.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)


class _TextLoader(_Loader):
    """Leaves every value but null as the text that it is written as."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name is the base class's)
        first: [(tag, pattern) for tag, pattern in found if tag in (_NULL, _MERGE)]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _placed(path: Path) -> Path:
    """The file itself, or the recipe that the package brings where a `configs/NAME.yaml` is not there."""
    brought = [place / path for place in _RECIPES if path.parts[:-1] == ("configs",)]
    return next((each for each in brought if not path.exists() and each.is_file()), path)


def read_yaml(path: Path, hints: _Hints) -> dict[str, Any]:
    """Reads a mapping; an empty file is an empty one, and null where a field has none means that it is not given.

    Args:
        path: the file, in UTF-8 or UTF-16, with or without a byte-order mark.
        hints: type of each field by its name, as annotations have it; a mapping in place of a type says the same of the
            fields of a section.

    Raises:
        UserError: there is no such file, it is no YAML or no mapping, a key stands twice, or a section is no mapping.
    """
    try:
        content = _placed(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a YAML file that describes a run") from error
    try:
        values, texts = (yaml.load(content, loader) for loader in (_Loader, _TextLoader))
        problem = _unfit(values)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a YAML file that describes a run: {_reason(error)}; mend it") from error
    if problem is not None:
        raise UserError(f"{path} {problem}; give a YAML file that describes a run")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no names with values, such as 'output: runs/x'; give a YAML file that does")
    return _present(_typed(values, texts, hints), hints, f"{path}: ")


def write_yaml(content: Mapping[str, Any], path: Path) -> None:
    """Writes a mapping whose texts no reader takes for anything else."""
    path.write_text(yaml.dump(dict(content), Dumper=_Dumper), encoding="utf-8")


def marked(content: Mapping[str, Any], hints: _Hints) -> dict[str, Any]:
    """Hides texts that look like null from the option parser, in fields for text or null: `"null"` is a name."""
    found = {}
    for name, value in content.items():
        hint = hints.get(name)
        if isinstance(value, dict):
            value = marked(value, _fields(hint))
        elif isinstance(value, str) and value in _LIKE_NULL and {str, type(None)} <= set(_choices(hint)):
            value = _MARK + value
        found[name] = value
    return found


def unmarked(value: Any) -> Any:
    """Undoes `marked` in what the option parser has made of it, in place where it can."""
    if isinstance(value, str):
        return value.removeprefix(_MARK)
    if isinstance(value, Namespace):
        for name, each in vars(value).items():
            setattr(value, name, unmarked(each))
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        place = "" if mark is None else f" in line {mark.line + 1}"
        return f"{error.problem or error.context}{place}"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _unfit(values: Any) -> str | None:
    """Says what no description of a run has: endless nesting, masses of values, names that are no text."""
    pending: list[tuple[Any, int]] = [(values, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            return "is nested without end, or holds too many values"
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return f"holds half a character in {value!r}"
        if isinstance(value, dict):
            if odd := [key for key in value if key is None or isinstance(key, tuple | bytes)]:
                return f"has {odd[0]!r} where a name should stand"
            pending += [(key, depth + 1) for key in value] + [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | set | tuple):
            pending += [(each, depth + 1) for each in value]
    return None


def _typed(value: Any, text: Any, hint: Any) -> Any:
    """Chooses between a value and its text, by the type that is asked for."""
    if isinstance(value, dict) and isinstance(text, dict):
        hints = _fields(hint)
        return {
            str(name): _typed(each, written, hints.get(str(name)))
            for each, (name, written) in zip(value.values(), text.items(), strict=True)
        }
    if isinstance(value, list) and isinstance(text, list):
        inner = next((get_args(each)[0] for each in _choices(hint) if get_origin(each) in (tuple, list)), None)
        return [_typed(each, written, inner) for each, written in zip(value, text, strict=True)]
    if value is None or isinstance(value, str) or not isinstance(text, str):
        return value
    return value if not _takes_text(hint) or _takes(value, hint) else text


def _present(content: dict[str, Any], hints: _Hints, where: str) -> dict[str, Any]:
    """Leaves out nulls of fields that have none, and refuses sections that are no mappings."""
    found = {}
    for name, value in content.items():
        hint = hints.get(name)
        if value is None and hint is not None and type(None) not in _choices(hint):
            continue
        if (inner := _fields(hint)) and value is not None:
            # The attention of a model may be its name alone, or a list of those of its layers.
            if not isinstance(value, dict) and not name.endswith("attention"):
                raise UserError(f"{where}{name} is {value!r}; give its fields, such as '{next(iter(inner))}: ...'")
            if isinstance(value, dict):
                value = _present(value, inner, f"{where}{name}.")
            elif not isinstance(value, list):
                value = str(value)
        found[name] = value
    return found


def _choices(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fields(hint: Any) -> _Hints:
    for each in _choices(hint):
        if isinstance(each, Mapping):
            return each
        if is_dataclass(each) and isinstance(each, type):
            return get_type_hints(each)
    return {}


def _takes_text(hint: Any) -> bool:
    return any(
        each is str or (get_origin(each) is Literal and isinstance(get_args(each)[0], str)) for each in _choices(hint)
    )


def _takes(value: Any, hint: Any) -> bool:
    return any(type(value) is each or (type(value) is int and each is float) for each in _choices(hint))
