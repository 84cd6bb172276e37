"""Models that a run starts from: its base, and the teacher of attention transfer and distillation."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.data.sources.remote import given_by
from lin_jax.errors import UserError
from lin_jax.models.params import differences, listed, params_of, shapes
from lin_jax.models.registry import ModelFamily, family_of_config, model_class
from lin_jax.training.checkpoint.loading import read_base
from lin_jax.training.config import RunConfig
from lin_jax.training.model_source import ModelSource
from lin_jax.training.objectives.registry import keeps_base, kind_of


@dataclass(frozen=True)
class BaseModel:
    """A trained model to start from, or to stand on.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        source: its place; None for a model in memory.
    """

    model: Any
    tokenizer: Tokenizer
    source: ModelSource | None = None


@dataclass(frozen=True)
class Teacher:
    """A model that says what is to be learnt; it is never changed.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        name: its place, or a name, for messages.
    """

    model: Any
    tokenizer: Tokenizer
    name: str


def open_base(config: RunConfig, *, resume: bool) -> ModelSource | None:
    """Opens the model that a run starts from, or stands on; None if it names none.

    Raises:
        UserError: there is no such place, or its weights are int8 and are to be trained.
    """
    if config.init_from is None:
        return None
    # What stands on a frozen model goes on with the very one that it began with, even if its own run has gone on since.
    step = read_base(config.output).step if resume and keeps_base(config) else None
    with given_by("--init_from"):
        source = ModelSource.open(config.init_from, step or None)
    if source.rounded and kind_of(config).trains.has_model:
        raise UserError(
            f"init_from {config.init_from} has int8 weights, which are for decoding; give the model that they were "
            f"rounded from, or turn them back: python -m lin_jax hub import {config.init_from} OUT --weights float"
        )
    return source


def load_base(
    config: RunConfig, source: ModelSource | None, resume: bool, shardings: Callable[..., jax.sharding.Sharding]
) -> BaseModel | None:
    """Reads the model that a run starts from, or stands on; None if it needs none, or no longer.

    Args:
        config: the run, with the options of its base.
        source: the model's place.
        resume: True if the run has begun already.
        shardings: of the model's variables, by path and shape, where they are read one by one.

    Raises:
        UserError: there is no such model, or the run cannot begin from it.
    """
    if source is None or (resume and not keeps_base(config)):
        return None
    kind = kind_of(config)
    # Heads stand on the model as it is stored; a model that goes on learning may do so in another type.
    compute = config.model.compute if kind.trains.has_model else None
    model = source.model(purpose=kind.purpose, compute=compute, shardings=shardings)
    base = BaseModel(model, source.tokenizer(config.data.tokenizer, option="--data.tokenizer"), source)
    check_base(config, base, str(source.place))
    return base


def check_base(config: RunConfig, base: BaseModel, name: str) -> None:
    """Refuses a model that a run cannot begin from.

    Raises:
        UserError: it is of another family, or of a kind that the objective has no use for.
    """
    kind, model = kind_of(config), base.model
    _check_family(config, family_of_config(model.config), name)
    if not kind.trains.has_model and not isinstance(model, model_class(model.config, kind.purpose)):
        raise UserError(f"init_from {name} holds a {type(model).__name__}, which heads cannot stand on; give another")


def with_options_of_base(config: RunConfig, source: ModelSource | None) -> RunConfig:
    """Takes the sizes of the checkpoint that a run starts from into its configuration, if that is not a run's.

    Only how tokens are mixed and how the model is computed are the run's own to say.

    Raises:
        UserError: the checkpoint cannot be opened, or is of another family.
    """
    if source is None or source.is_run:
        return config
    return with_sizes(config, source.config, str(source.place))


def with_sizes(config: RunConfig, sizes: Any, name: str) -> RunConfig:
    """Takes the sizes of a model into a run's configuration; attention and computation stay the run's own.

    Raises:
        UserError: the model is of another family.
    """
    family = family_of_config(sizes)
    _check_family(config, family, name)
    if not kind_of(config).trains.has_model:
        return replace(config, family=family.name, model=sizes)
    return replace(config, model=replace(sizes, **own_options(config.model)))


def own_options(model: Any) -> dict[str, Any]:
    """Options of a model that are a run's own to say, whatever it begins from: its attention, and its computation."""
    mixers = [each.name for each in fields(model) if isinstance(getattr(model, each.name), AttentionConfig)]
    return {name: getattr(model, name) for name in mixers} | vars(model.compute)


def load_teacher(config: RunConfig, source: ModelSource | None, base: BaseModel | None) -> Teacher:
    """Reads the teacher of a run.

    Args:
        config: the run, whose model is fully described.
        source: the place of the model that the run starts from.
        base: that model, if it is at hand: it may be the teacher, too.

    Raises:
        UserError: there is no teacher.
    """
    place = teacher_source(config, source)
    if base is not None and place is source:
        return Teacher(base.model, base.tokenizer, str(place.place))
    model = place.model(compute=config.model.compute)
    return Teacher(model, place.tokenizer(config.data.tokenizer, option="--data.tokenizer"), str(place.place))


def teacher_source(config: RunConfig, source: ModelSource | None) -> ModelSource:
    """Finds the teacher of a run: as the run says, or the newest model behind `init_from` with another attention.

    Raises:
        UserError: there is none.
    """
    if config.teacher is not None:
        if source is not None and Path(config.teacher) == source.place and source.selector is None:
            return source
        with given_by("--teacher"):
            return ModelSource.open(config.teacher)
    model: Any = config.model
    place, attention = source, model.attention
    while place is not None:
        own: Any = place.config
        if own.attention.of_layers(model.num_layers) != attention.of_layers(model.num_layers):
            return place
        before = place.run.init_from if place.is_run else None
        place = None if before is None else ModelSource.open(before)
    raise UserError(
        f"no model behind init_from {config.init_from} has another attention than this run's, "
        f"{attention.label}; name the teacher with --teacher"
    )


def check_teacher(config: RunConfig, teacher: Teacher, tokenizer: Tokenizer, base: BaseModel | None) -> None:
    """Refuses a teacher that cannot teach a run's model.

    Args:
        config: the run, whose model is fully described.
        teacher: the teacher.
        tokenizer: of the run.
        base: the model that the run starts from, if it is at hand.

    Raises:
        UserError: vocabularies, tokenizers or, for attention transfer, sizes differ.
    """
    model = teacher.model
    if model.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the teacher {teacher.name} has a vocabulary of {model.config.vocab_size}, the model of "
            f"{config.model.vocab_size}; a teacher needs the same tokenizer"
        )
    if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the teacher {teacher.name} has another tokenizer than the model; give one with the same")
    if config.objective == "attention_transfer" and base is not None:
        there, here = (
            {name: kind for name, kind in shapes(params_of(each)).items() if "/mixer/" not in name}
            for each in (model, base.model)
        )
        if phrases := differences(there, here):
            raise UserError(f"the teacher {teacher.name} is another model than that of init_from: {listed(phrases)}")


def _check_family(config: RunConfig, family: ModelFamily, name: str) -> None:
    kind = kind_of(config)
    if kind.trains.has_model and family.name != config.family:
        raise UserError(
            f"init_from {name} holds a {family.name}, and the family of this run is {config.family}; "
            f"give family {family.name}"
        )
    if kind.purpose not in family.models:
        raise UserError(
            f"init_from {name} holds a {family.name}, which has no model for {kind.purpose}, as objective "
            f"'{config.objective}' needs; give another folder"
        )
