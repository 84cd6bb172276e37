"""Writes the parts of the reference that follow from the code: options of YAML files, command lines, sizes of states.

python docs/write_reference.py            # after a change of an option; a test says when
"""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from unittest import mock

import docstring_parser
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.attention import AttentionConfig, build_mixer, has_growing_state
from lin_jax.cli.main import COMMANDS
from lin_jax.data.config import MixturePart
from lin_jax.errors import OptionParser
from lin_jax.models import MODELS
from lin_jax.training.config import RunConfig
from lin_jax.training.distributed.launch import Launch

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/write_reference.py: change the code's docstrings, and run it. -->"
# Sizes of LLaMA 3.2 1B, for the table of states: layers, query heads, key/value heads, size of a head.
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 64
CONTEXTS = (4096, 131072)
STATES: tuple[tuple[str, AttentionConfig], ...] = (
    ("softmax", AttentionConfig("softmax")),
    ("softmax, window: 512", AttentionConfig("softmax", window=512)),
    ("augmented", AttentionConfig("augmented")),
    ("flash", AttentionConfig("flash")),
    ("relu+local+convolution", AttentionConfig("relu+local+convolution")),
    ("performer", AttentionConfig("performer")),
    ("rfa", AttentionConfig("rfa")),
    ("exponential+window", AttentionConfig("exponential+window")),
    ("exponential+window, window: 64", AttentionConfig("exponential+window", window=64)),
    ("hedgehog+window, window: 64, decay: token", AttentionConfig("hedgehog+window", window=64, decay="token")),
    (
        "exponential+window, window: 64, sinks: 4",
        AttentionConfig("exponential+window", window=64, sinks=4),
    ),
    ("linformer", AttentionConfig("linformer")),
    ("yoso", AttentionConfig("yoso")),
    ("transnormer", AttentionConfig("transnormer")),
)

# Commands whose options are not a parser's.
OTHERWISE = {
    "train": "`lin-jax train CONFIG.yaml [--resume] [--section.field VALUE ...]`: the fields are those of "
    "[YAML files](options.md). `--resume` goes on from the newest checkpoint in the output folder. A "
    "`configs/NAME.yaml` that is not there is looked for among the recipes of the package.",
    "lm-eval": "What follows is the harness's own command line: [Evaluation](../evaluation.md#lm-evaluation-harness).",
}


def pages() -> dict[Path, str]:
    """The text of every page that follows from the code."""
    return {
        REFERENCE / "options.md": options_page(),
        REFERENCE / "commands.md": commands_page(),
        REFERENCE / "state-sizes.md": _between(REFERENCE / "state-sizes.md", states_table()),
    }


def options_page() -> str:
    """Every field of a run's YAML file, section by section."""
    lines = [
        "# Options of YAML files",
        NOTE,
        "A file for `train.py` (or `lin-jax train`) is a mapping of these fields; what it does not say has its "
        "default. On a command line, `--section.field VALUE` overrides a field, such as `--training.steps 2000`. "
        "Recipes to begin from are in `configs/`; a run's folder holds all of its fields, resolved, in `config.yaml`.",
        "A file may also have `stages`, a list of names with fields of their own, and `held_out`, fields of `data`: "
        "[linearizing](../linearizing.md#stages). `attention` may be a name or a list: [attentions](../attention.md).",
        *_section("The run", RunConfig, ""),
    ]
    for name, family in MODELS.items():
        lines += _section(f"`model`, of family `{name}`", family.config, "model")
    lines += _section("`data.mixture`, each part", MixturePart, "")
    lines += _section("Options of the command line alone", Launch, "--launch")
    return "\n\n".join(lines) + "\n"


def _section(title: str, kind: Any, prefix: str, level: int = 2) -> list[str]:
    """The heading, summary and table of a dataclass, and the sections inside it."""
    hints, told = get_type_hints(kind), _told(kind)
    rows, inner = [], []
    for each in fields(kind):
        key = f"{prefix}.{each.name}".lstrip(".")
        section = _dataclass_in(hints[each.name])
        if section is AttentionConfig and kind is not AttentionConfig and "attention" in _seen(kind, prefix):
            section = None
        if each.name == "model" and kind is RunConfig:
            rows.append((f"`{key}`", "", "the model: one section for each family below"))
        elif section is None:
            rows.append((f"`{key}`", _default(each), told.get(each.name, "")))
        else:
            rows.append((f"`{key}`", _default(each, section), f"{told.get(each.name, '')} Section below.".strip()))
            inner.append((key, section))
    found = [f"{'#' * level} {title}", _summary(kind), _table(("option", "default", ""), rows)]
    for key, section in inner:
        if section is AttentionConfig and key != "model.attention":
            continue
        if section is AttentionConfig and kind is not MODELS["llama"].config:
            found.append(f"`{key}` has the fields of [`model.attention`](#modelattention).")
            continue
        found += _section(f"`{key}`", section, key, level + 1)
    return found


def _seen(kind: Any, prefix: str) -> str:
    return "" if kind in {family.config for family in MODELS.values()} else prefix


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a field's type is, or may be beside null."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = [each for each in choices if is_dataclass(each)]
    return found[0] if len(found) == 1 else None


def _told(kind: Any) -> dict[str, str]:
    """What docstrings say of the fields of a class and of those that it extends."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if is_dataclass(each) and each.__doc__:
            parsed = docstring_parser.parse(inspect.cleandoc(each.__doc__), docstring_parser.DocstringStyle.GOOGLE)
            found |= {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}
    return found


def _summary(kind: Any) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__).split("\n\n")[0].split())


def _default(each: "Field[Any]", section: Any = None) -> str:
    if each.default is not MISSING:
        return f"`{_yaml(each.default)}`"
    if each.default_factory is not MISSING:
        return "" if section is not None else f"`{_yaml(each.default_factory())}`"
    return "must be given"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def commands_page() -> str:
    """Every command, its arguments and options."""
    lines = [
        "# Command lines",
        NOTE,
        "`lin-jax COMMAND`, or `python -m lin_jax COMMAND`; in a working copy, `python train.py` is `lin-jax train` "
        "and `python decode.py` is `lin-jax decode`. A wrong value ends a command with one line and status 2, Ctrl-C "
        "with 130.",
    ]
    for name, command in COMMANDS.items():
        lines += [f"## {name}", f"{command.about[0].upper()}{command.about[1:]}."]
        if name in OTHERWISE:
            lines.append(OTHERWISE[name])
            continue
        parser = _parser_of(command.module)
        commands = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        for inner, each in [(inner, each) for one in commands for inner, each in one.choices.items()] or [("", parser)]:
            lines += [f"### {name} {inner}"] if inner else []
            lines += [each.description] if each.description and inner else []
            lines += _groups(each)
    return "\n\n".join(lines) + "\n"


class _Found(Exception):  # noqa: N818 - it carries a parser out of a command
    """Carries the parser of a command that is about to parse its options."""


def _parser_of(module: str) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(parser)

    with mock.patch.object(OptionParser, "parse_args", stop):
        try:
            importlib.import_module(module).main([])
        except _Found as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"{module} has parsed nothing")


def _groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        rows = [(_spelled(action), _helped(action)) for action in group._group_actions if action.dest != "help"]
        if rows:
            standard = group.title in ("positional arguments", "options", "optional arguments")
            title = "" if standard else f"*{group.title}*\n\n"
            yield title + _table(("arguments" if group.title == "positional arguments" else "option", ""), rows)


def _spelled(action: argparse.Action) -> str:
    shown = action.metavar or (action.dest.upper() if action.type or action.nargs != 0 else "")
    if isinstance(shown, tuple):
        shown = " ".join(shown)
    if action.choices and not action.metavar:
        shown = "{" + ",".join(map(str, action.choices)) + "}"
    shown = shown.replace("|", " or ")
    if not action.option_strings:
        return f"`{shown}`"
    return f"`{', '.join(action.option_strings)}{'' if action.nargs == 0 else f' {shown}'}`"


def _helped(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    if "default" in text or action.default in (None, False, "", [], argparse.SUPPRESS) or action.required:
        return text
    return f"{text} (default: {action.default})"


def states_table() -> str:
    """Bytes of the decode state of one sequence, by attention, at two lengths."""
    head = ("attention", "a layer, numbers", *(f"all layers after {count:,} tokens" for count in CONTEXTS))
    return _table(head, [_state_row(label, config) for label, config in STATES])


def _state_row(label: str, config: AttentionConfig) -> tuple[str, ...]:
    sizes = {count: _layer_state(config, count) for count in CONTEXTS}
    numbers = sizes[CONTEXTS[0]][0]
    shown = f"{numbers:,}" + (f" at {CONTEXTS[0]:,} tokens" if has_growing_state(config) else "")
    return f"`{label}`", shown, *(f"{LAYERS * size / 2**20:,.1f} MiB" for _, size in sizes.values())


def _layer_state(config: AttentionConfig, context: int) -> tuple[int, int]:
    """Numbers and bytes of the state of one layer of a model in bfloat16, positions left out."""

    def build() -> Any:
        mixer = build_mixer(config, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0))
        return mixer.init_state(1, context, jnp.bfloat16)

    leaves = [leaf for leaf in jax.tree.leaves(jax.eval_shape(build)) if not jnp.issubdtype(leaf.dtype, jnp.integer)]
    numbers = [int(np.prod(leaf.shape)) for leaf in leaves]
    return sum(numbers), sum(count * leaf.dtype.itemsize for count, leaf in zip(numbers, leaves, strict=True))


def _between(path: Path, text: str, mark: str = "<!-- states -->") -> str:
    before, _, after = path.read_text(encoding="utf-8").split(mark)
    return f"{before}{mark}\n{text}\n{mark}{after}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
