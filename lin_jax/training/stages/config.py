"""Several runs in one YAML file: `stages`, each of them the file's fields with some of its own."""

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lin_jax.data import DataConfig
from lin_jax.data.sources.remote import given_by, is_remote
from lin_jax.errors import UserError
from lin_jax.training.config import RunConfig
from lin_jax.training.config_file import Command, parse_run_config, run_hints
from lin_jax.training.distributed.launch import Launch
from lin_jax.training.initialization.base_and_teacher import own_options, with_options_of_base
from lin_jax.training.model_source import ModelSource
from lin_jax.training.objectives.registry import kind_of, objective_of
from lin_jax.training.settings.yaml_file import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PREFIX, _HELD_OUT, _DATA = "--stages.", "--held_out.", "--data."
# Fields that are not for a stage to say.
_COMMON = ("output", "stages", "held_out")


@dataclass(frozen=True)
class Stage:
    """A stage: the runs that it consists of, one after the other, the last of them in the stage's own folder.

    Attributes:
        name: its name.
        runs: more than one where attention is transferred in blocks of layers.
    """

    name: str
    runs: tuple[RunConfig, ...]

    @property
    def last(self) -> RunConfig:
        """The run that the stage ends with."""
        return self.runs[-1]


@dataclass(frozen=True)
class Pipeline:
    """Stages that begin each where the one before ended.

    Attributes:
        output: folder of all of them; a stage has its own inside, by its name.
        stages: the stages.
        held_out: the text that their models are compared on, of which the held-out part is read.
    """

    output: Path
    stages: tuple[Stage, ...]
    held_out: DataConfig


def parse_command(argv: Sequence[str]) -> tuple[RunConfig | Pipeline, bool, Launch]:
    """The run or the stages that a command line describes, whether they are to be resumed, and with which processes.

    Options override the file's fields, those that a stage has of its own too; `--stages.NAME.section.field VALUE`
    overrides a field of one stage, `--held_out.field VALUE` one of the text that models are compared on; what that says
    of its own is not overridden by `--data.field`.

    Args:
        argv: `CONFIG.yaml [--resume] [--launch.option VALUE ...] [--section.field VALUE ...]`.

    Raises:
        UserError: the file is missing, an option is unknown, or a value is wrong.
        SystemExit: help was asked for.
    """
    content = _read(argv)
    if "stages" not in content:
        return parse_run_config(argv)
    stages, held_out = content.pop("stages"), content.pop("held_out", {})
    _check(stages)
    options, own, compared = _sorted_options(list(argv[1:]), [stage["name"] for stage in stages])
    common, resume, launch = _parse(content, {}, options, "the fields that all stages share")
    runs: list[RunConfig] = []
    for stage in stages:
        fields = {name: value for name, value in stage.items() if name != "name"}
        extra = [*own[stage["name"]], "--output", str(Path(common.output) / stage["name"])]
        if runs and "init_from" not in fields and "--init_from" not in extra:
            extra += ["--init_from", runs[-1].output]
        runs.append(_parse(content, fields, [*options, *extra], f"stage '{stage['name']}'").config)
    options = [*_without(options, [f"{_DATA}{name}" for name in held_out or {}]), *compared]
    read = _parse(content, {"data": held_out or {}}, options, "held_out").config
    found = tuple(Stage(stage["name"], (run,)) for stage, run in zip(stages, runs, strict=True))
    return Pipeline(Path(common.output), found, read.data), resume, launch


def completed(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the size of every model, and a run for each block whose attention is transferred on its own.

    Raises:
        UserError: there is nothing to begin from, or no run can be made of a stage.
    """
    runs: list[RunConfig] = []
    stages = []
    for stage in pipeline.stages:
        try:
            runs.append(_complete(stage.last, runs[-1] if runs else None))
            stages.append(Stage(stage.name, tuple(_blocks(runs[-1]))))
            if kind_of(stage.last).trains.has_model:
                for run in stages[-1].runs:
                    objective_of(replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or 1)))
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from None
    return replace(pipeline, stages=tuple(stages))


def _read(argv: Sequence[str]) -> dict[str, Any]:
    """Reads the file that is the first argument, if it is one; text stays text, in stages too."""
    if not argv or argv[0].startswith("-"):
        return {}
    family = read_yaml(Path(argv[0]), {"family": str}).get("family", RunConfig.family)
    fields = run_hints(str(family))
    stages: Any = types.GenericAlias(list, ({**fields, "name": str},))
    return read_yaml(Path(argv[0]), {**fields, "stages": stages, "held_out": DataConfig})


def _check(stages: Any) -> None:
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError("stages is no list of stages; give one or more, each with a name and fields of its own")
    names = []
    for number, stage in enumerate(stages, start=1):
        name = stage.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"stage {number} has the name {name!r}; give it one of letters, digits, '_', '.' and '-'")
        if name in names:
            raise UserError(f"two stages have the name '{name}'; give each its own")
        names.append(name)
        if misplaced := [each for each in _COMMON if each in stage]:
            raise UserError(f"stage '{name}' has the field {misplaced[0]}, which is for the whole file; move it there")


def _sorted_options(options: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Options for all stages, those of each by its name, without `--stages.NAME.`, and those of held-out text."""
    everywhere: list[str] = []
    compared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    place = everywhere
    for word in options:
        if word.startswith("--"):
            place = everywhere
        if word.startswith(_HELD_OUT):
            place = compared
            word = _DATA + word.removeprefix(_HELD_OUT)
        if word.startswith(_PREFIX):
            found = [name for name in names if word.startswith(f"{_PREFIX}{name}.")]
            if not found:
                raise UserError(f"{word.split('=')[0]} is for no stage; the stages are {', '.join(names)}")
            name = max(found, key=len)
            place = own[name]
            word = "--" + word.removeprefix(f"{_PREFIX}{name}.")
        place.append(word)
    return everywhere, own, compared


def _without(options: list[str], names: list[str]) -> list[str]:
    """The options without some of them and their values."""
    kept, left_out = [], False
    for word in options:
        if word.startswith("--"):
            left_out = word.split("=")[0] in names
        if not left_out:
            kept.append(word)
    return kept


def _parse(content: dict[str, Any], fields: dict[str, Any], options: Sequence[str], what: str) -> Command:
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("common.yaml", "own.yaml")]
        for file, part in zip(files, (content, fields), strict=True):
            file.write_text(yaml.safe_dump(part), encoding="utf-8")
        arguments = [word for file in files for word in ("--config", str(file))]
        try:
            return parse_run_config([*arguments, *options])
        except UserError as error:
            # The files are ours, and gone by the time that somebody reads this.
            text = re.sub(rf"{re.escape(folder)}/\w+\.yaml: ", "", str(error))
            raise UserError(f"{what}: {text}") from None


def _complete(run: RunConfig, before: RunConfig | None) -> RunConfig:
    """A stage's run with the sizes of the model that it begins from."""
    if before is not None and run.init_from == before.output:
        if not kind_of(before).trains.has_model:
            raise UserError(f"it begins from {before.output}, which will hold heads and no model; give it an init_from")
        return replace(run, model=replace(before.model, **own_options(run.model)))
    if run.init_from is not None and not is_remote(run.init_from) and not Path(run.init_from).exists():
        raise UserError(f"init_from {run.init_from} does not exist; give a run folder, a checkpoint's folder or a file")
    with given_by("--init_from"):
        source = None if run.init_from is None else ModelSource.open(run.init_from)
    return with_options_of_base(run, source)


def _blocks(run: RunConfig) -> Iterator[RunConfig]:
    """The runs of a stage: itself, or one for each block of layers whose attention is transferred in turn."""
    count = run.transfer.blocks
    if run.objective != "attention_transfer" or count == 1:
        yield run
        return
    layers, steps = run.model.num_layers, run.training.steps
    if count > min(layers, steps):
        raise UserError(
            f"transfer.blocks is {count}, and the model has {layers} layers to be learnt in {steps} steps; give fewer"
        )
    begin = run.init_from
    for block in range(count):
        (first, end), (done, until) = ((n * block // count, n * (block + 1) // count) for n in (layers, steps))
        output = run.output if block == count - 1 else str(Path(run.output) / f"block_{block + 1}")
        yield replace(
            run,
            output=output,
            init_from=begin,
            transfer=replace(run.transfer, layers=(first, end), blocks=1),
            training=replace(run.training, steps=until - done),
        )
        begin = output
