"""Pasts of models in memory: where they are from, what they learnt from, and the tokens that end their texts."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lin_jax.attention import parse_name
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.config_json import attentions_of
from lin_jax.hub.save import TOKENIZER_FILES
from lin_jax.training.model_source import ModelSource


@dataclass(frozen=True)
class Origin:
    """A model's past.

    Attributes:
        teacher: the teacher of its linearized forms, or its place.
        end_tokens: tokens that end its texts.
        run: folder that it was trained in.
        steps: optimizer steps that it was trained for there.
        weights: storage of the weights of the copy that writes texts.
        learns: whether it may be trained; what was read from int8 weights may not.
    """

    teacher: ModelSource | Any
    end_tokens: tuple[int, ...]
    run: Path | None = None
    steps: int = 0
    weights: str = "stored"
    learns: bool = True


# Weak, so that models are freed when nobody else holds them.
_origins: "weakref.WeakKeyDictionary[Any, Origin]" = weakref.WeakKeyDictionary()


def origin_of(model: Any) -> Origin | None:
    """The past of a model; None for one that was made elsewhere."""
    return _origins.get(model)


def remember(model: Any, origin: Origin) -> None:
    """Notes a model's past, as long as the model is there."""
    _origins[model] = origin


def open_place(place: str | Path, step: Any = None) -> ModelSource:
    """Opens a place of a model; OWNER/NAME is one on the Hub where there is no such path.

    Raises:
        UserError: there is no such place.
    """
    name = str(place)
    if isinstance(place, str) and name.count("/") == 1 and not Path(name).expanduser().exists():
        place = name if name.startswith(("hub:", ".", "~", "/")) else f"hub:{name}"
    return ModelSource.open(place, step)


def tokenizer_of(source: ModelSource, named: str | Path | Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that is named, or else the place's own; None if it holds none.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(named, Tokenizer):
        return named
    if source.place.is_file():
        return None if named is None else source.tokenizer(str(named), option="tokenizer=")
    if named is not None:
        return load_tokenizer(named)
    if source.is_run or any((source.place / name).is_file() for name in TOKENIZER_FILES):
        return source.tokenizer()
    return None


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Refuses a tokenizer that is not there, as a place has it that holds none.

    Raises:
        UserError: there is none.
    """
    if tokenizer is None:
        raise UserError("the tokenizer is None; name the model's with from_pretrained(..., tokenizer=PATH)")


def check_learns(model: Any) -> None:
    """Refuses to train what was loaded from int8 weights, unless that was asked for.

    Raises:
        UserError: the model was loaded so.
    """
    origin = origin_of(model)
    if origin is not None and not origin.learns:
        raise UserError(
            "the model was loaded from int8 weights, which are for decoding; load the model that they were rounded "
            'from, or the numbers that they stand for with from_pretrained(..., dtype="float32")'
        )


def end_tokens_of(model: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a model's texts: those of its past, or else the tokenizer's."""
    origin = origin_of(model)
    if origin is not None and origin.end_tokens:
        return origin.end_tokens
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def known_teacher(teacher: Any, model: Any) -> Any:
    """The teacher that is given, or else the one that a linearized model has learnt from.

    Raises:
        UserError: neither is known, or its place holds no model.
    """
    origin = origin_of(model)
    if teacher is None:
        teacher = None if origin is None else origin.teacher
    if teacher is None:
        raise UserError("the teacher of this model is not known; give teacher=, the model before it was linearized")
    return teacher_model(teacher, model)


def teacher_model(teacher: Any, model: Any) -> Any:
    """The teacher itself, read from its place if it is a place, in the types that the model computes in."""
    if isinstance(teacher, str | Path):
        teacher = open_place(teacher)
    return teacher.model(compute=model.config.compute) if isinstance(teacher, ModelSource) else teacher


def is_result(model: Any, place: Path | None, steps: int) -> bool:
    """True for the model that the same call has made before: a notebook's cell that is run again gets its own result.

    Raises:
        UserError: the folder holds this model after another number of steps.
    """
    origin = origin_of(model)
    if place is None or origin is None or origin.run != place:
        return False
    if origin.steps != steps:
        raise UserError(f"{place} holds this model after {origin.steps} steps, not {steps}; give another output")
    return True


def is_softmax(model: Any) -> bool:
    """True for a model whose attention is softmax in all layers."""
    every = [kind for each in attentions_of(model.config).values() for kind in each.kinds]
    return all(parse_name(each.name).base == "softmax" for each in every)
