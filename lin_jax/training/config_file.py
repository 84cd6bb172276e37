"""Runs described in YAML, with any field overridden by options; and keys of earlier versions."""

import argparse
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser

from lin_jax.errors import UserError
from lin_jax.models.registry import model_family
from lin_jax.training.config import CONFIG_FILE, RunConfig
from lin_jax.training.distributed.launch import Launch
from lin_jax.training.objectives.registry import check_run
from lin_jax.training.settings.yaml_file import marked, read_yaml, unmarked, write_yaml

# Keys of earlier versions, and the keys that took their place.
RENAMED = {
    "adapters.targets": "adapters.target_modules",
    "adapters.also": "adapters.modules_to_save",
    "head_targets": "heads.targets",
    "medusa_heads": "heads.depth",
    "medusa_decay": "heads.decay",
    "path_depth": "heads.depth",
    "path_decay": "heads.decay",
    "path_width": "heads.width",
    "head_coefficient": "heads.loss_weight",
    "head_learning_rate_factor": "heads.learning_rate_factor",
    "joint_warmup_steps": "heads.warmup_steps",
    "model.window": "model.attention.window",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "training.accumulation": "training.gradient_accumulation",
    "training.watch.stall_seconds": "training.monitoring.stall_seconds",
    "training.watch.hang_seconds": "training.monitoring.hang_seconds",
    "training.watch": "training.loss_spikes",
}
# Of two old keys with one successor, those of objectives that a run does not have are left out.
_OF_OBJECTIVE = {"medusa_heads": "medusa", "medusa_decay": "medusa", "path_depth": "path", "path_decay": "path"}


class Command(NamedTuple):
    """A run, whether it is resumed, and how its processes find each other."""

    config: RunConfig
    resume: bool
    launch: Launch


def parse_run_config(argv: Sequence[str]) -> Command:
    """Parses a run's command line.

    Args:
        argv: `CONFIG.yaml [--resume] [--launch.option VALUE ...] [--section.field VALUE ...]`.

    Raises:
        UserError: the file is missing, an option is unknown, or a value is wrong.
        SystemExit: help was asked for.
    """
    argv = list(argv)
    if not argv:
        raise UserError("no configuration is given; give a YAML file, such as configs/tiny.yaml")
    if not argv[0].startswith("-"):
        argv.insert(0, "--config")
    parser = _parser(_family(argv))
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_class_arguments(Launch, "launch")
    command = _parse(parser, argv)
    check_run(command.config)
    return command


def load_run_config(path: str | Path) -> RunConfig:
    """Reads the configuration of a run folder (with `output` as it is given here), or of a YAML file.

    Raises:
        UserError: there is none, or it is not one that this version understands.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            raise UserError(f"{path} is not a run folder: it holds no {CONFIG_FILE}; give the output of a train.py run")
        return replace(load_run_config(path / CONFIG_FILE), output=str(path))
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"there is no folder {path}; give the output of a train.py run")
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # The parser itself reports what is wrong.
    return _in_file(path, content)


@lru_cache(maxsize=32)
def _in_file(path: Path, _content: bytes) -> RunConfig:
    """Reads a file with this content: runs that stand on others read theirs again and again."""
    argv = ["--config", str(path)]
    return _parse(_parser(_family(argv)), argv, translated=path.name == CONFIG_FILE).config


def _family(argv: Sequence[str]) -> str:
    """Finds the family that a command line, or else its files, names: it decides which options there are."""
    quick = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    quick.add_argument("--config", action="append", default=[])
    quick.add_argument("--family")
    try:
        said, _ = quick.parse_known_args(list(argv))
    except ArgumentError:
        return RunConfig.family  # The parser itself reports what is wrong.
    contents = [read_yaml(Path(path), {"family": str}) for path in said.config]
    named = [content["family"] for content in contents if "family" in content]
    return said.family or str((named or [RunConfig.family])[-1])


def run_hints(family: str) -> dict[str, Any]:
    """Types of a run's fields and of its options, by name.

    Raises:
        UserError: there is no such family.
    """
    options = {"launch": Launch, "resume": bool}
    return {**get_type_hints(RunConfig), **options, "model": model_family(family).config}


def _parser(family: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lin_jax train",
        usage="python -m lin_jax train CONFIG.yaml [--resume] [--section.field VALUE ...]",
        description="Trains a model, or draft heads for one, as a YAML file describes; options override the file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the YAML file, when it is not the first argument")
    parser.add_class_arguments(RunConfig, skip={"model"})
    parser.add_class_arguments(model_family(family).config, "model")
    return parser


def _parse(parser: ArgumentParser, argv: list[str], *, translated: bool = False) -> Command:
    with _present_files(_present_options(argv), run_hints(_family(argv)), translated) as present:
        try:
            parsed = parser.instantiate(unmarked(parser.parse_args(present)))
        except ArgumentError as error:
            message = " ".join(re.sub(r"<class '(\w+)'>", r"\1", str(error)).split())
            raise UserError(f"{message}; 'python -m lin_jax train --help' lists every option") from error
    values = {each.name: getattr(parsed, each.name) for each in fields(RunConfig)}
    return Command(RunConfig(**values), getattr(parsed, "resume", False), getattr(parsed, "launch", Launch()))


def _present_options(argv: Sequence[str]) -> list[str]:
    """Refuses options of earlier versions; `--model.attention` is short for a name or a list of them, for all layers.

    It replaces the attentions of layers that a file names.
    """
    options: list[str] = []
    words = list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name.startswith("--"):
            if (key := _renamed_key(name[2:])) is not None:
                raise UserError(f"{name} is now --{key}; give that")
            if name.startswith("--model.") and name.endswith("attention"):
                if not equals and not words:
                    raise UserError(f"{name} stands without a value; give a name, or a list of them in brackets")
                options += _attention_options(name, value if equals else words.pop(0))
                continue
        options.append(f"{name}{equals}{value}")
    return options


def _attention_options(name: str, value: str) -> list[str]:
    """The options of a model's attention that is given as its name, or as a list in brackets."""
    given = {"name": None, "pattern": value, "layers": "null"} if value.startswith("[") else {"name": value}
    given = {"pattern": "null", "layers": "null"} | given
    return [f"{name}.{field}={said}" for field, said in given.items() if said is not None]


def _renamed_key(key: str) -> str | None:
    """Finds the present name of an old key, or of a field inside an old section."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return None


@contextmanager
def _present_files(argv: Sequence[str], hints: Mapping[str, Any], translated: bool) -> Iterator[list[str]]:
    """Gives options with copies of their files, in which text is text and keys are present ones.

    Keys of an earlier version are refused, or with `translated` rewritten.

    Raises:
        UserError: a file cannot be read, or has a key of an earlier version.
    """
    with TemporaryDirectory() as folder:
        present = list(argv)
        for index, path in enumerate(argv):
            if index and argv[index - 1] == "--config":
                content = read_yaml(Path(path), hints)
                changed = _shortened_attention(content if not translated else _translated(content))
                _refuse_old_keys(changed, path)
                if "config" in changed:
                    raise UserError(f"{path}: config is for the command line; give further files there")
                copy = Path(folder) / f"{index}.yaml"
                write_yaml(marked(changed, hints), copy)
                present[index] = str(copy)
        yield present


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key of every value that is not a mapping."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse_old_keys(content: Mapping[str, Any], path: str) -> None:
    for key, _ in _keys(content):
        if (new := _renamed_key(key)) is not None:
            raise UserError(f"{path}: {key} is now {new}; rename it")


def _translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites the keys of a run folder that an earlier version wrote."""
    objective = str(content.get("objective", RunConfig.objective))
    found: dict[str, Any] = {}
    for key, value in _keys(content):
        if not objective.startswith(_OF_OBJECTIVE.get(key, "")) or (
            key == "model.window" and not _keeps_window(content)
        ):
            continue
        *sections, name = (_renamed_key(key) or key).split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    if objective == "path":
        # Path heads of earlier versions read the last layer alone.
        found.setdefault("heads", {}).setdefault("layers", [])
    return found


def _keeps_window(content: Mapping[str, Any]) -> bool:
    """True where an earlier version's `model.window` bounded softmax: beside any other attention it meant nothing."""
    model = content["model"]
    attention = model.get("attention")
    return model["window"] is not None and isinstance(attention, dict) and attention.get("name") == "softmax"


def _shortened_attention(content: Mapping[str, Any]) -> dict[str, Any]:
    """Expands `attention: NAME` and `attention: [NAME, ...]` in the model's section to a mapping."""
    model = content.get("model")
    if not isinstance(model, dict):
        return dict(content)
    expanded = {key: _expanded(value) if key.endswith("attention") else value for key, value in model.items()}
    return {**content, "model": expanded}


def _expanded(attention: Any) -> Any:
    """The fields of an attention that is a name or a list; what an earlier file says of layers falls away."""
    if isinstance(attention, str):
        return {"name": attention, "pattern": None, "layers": None}
    return {"pattern": attention, "layers": None} if isinstance(attention, list) else attention
