"""The teacher of a run: another model, which says what is to be learnt, and which is never changed."""

from pathlib import Path
from typing import Any

from lin_jax.data import Tokenizer
from lin_jax.data.llama2c_tokenizer import SPECIAL, load_tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.pretrained import Pretrained
from lin_jax.training.config import RunConfig, load_run_config
from lin_jax.training.loading import base_types, is_pretrained, load_any
from lin_jax.training.parameters import differences, listed, params_of, shapes

TOKENIZER_FOLDER = "tokenizer"


def load_teacher(config: RunConfig, tokenizer: Tokenizer, base: Any) -> Any:
    """The teacher of a run.

    Args:
        config: the run, whose model is fully described.
        tokenizer: of the run.
        base: the model of `init_from`, which may be the teacher too; None if it is not at hand.

    Raises:
        UserError: there is no teacher, or it is a model that cannot teach this one.
    """
    place = teacher_place(config)
    if base is not None and place == Path(config.init_from or ""):
        teacher = base
    else:
        teacher, _ = load_any(place, types=base_types(config))
    if teacher.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the teacher {place} has a vocabulary of {teacher.config.vocab_size}, the model of "
            f"{config.model.vocab_size}; a teacher needs the same tokenizer"
        )
    if load_tokenizer_of(place, config.data.tokenizer).fingerprint != tokenizer.fingerprint:
        raise UserError(f"the teacher {place} has another tokenizer than the model; give one with the same")
    if config.objective == "attention_transfer":
        _demand_alike(teacher, base, place)
    return teacher


def teacher_place(config: RunConfig) -> Path:
    """Where the teacher of a run is: as the run says, or the newest model behind `init_from` with another attention.

    Raises:
        UserError: there is none.
    """
    if config.teacher is not None:
        return Path(config.teacher)
    model: Any = config.model
    place, attention = config.init_from, model.attention
    while place is not None:
        if is_pretrained(place):
            if Pretrained.open(place).model.config.attention != attention:
                return Path(place)
            break
        run = load_run_config(place)
        there: Any = run.model
        if there.attention != attention:
            return Path(place)
        place = run.init_from
    raise UserError(
        f"no model behind init_from {config.init_from} has another attention than this run's, "
        f"{attention.name}; name the teacher with --teacher"
    )


def load_tokenizer_of(place: str | Path, named: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    A file of llama2.c holds none: it is a file of its own. Those models begin every text with a token and end none.

    Args:
        place: run folder, Hugging Face folder or file of llama2.c.
        named: where the tokenizer is, for a file of llama2.c.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = Path(place)
    if not place.is_file():
        return Tokenizer.load(place if is_pretrained(place) else place / TOKENIZER_FOLDER)
    if named is None:
        raise UserError(f"{place} holds no tokenizer; say where it is with --data.tokenizer FILE")
    if Path(named).is_dir():
        return Tokenizer.load(named)
    found = load_tokenizer(named, Pretrained.open(place).model.config.vocab_size)
    return Tokenizer(found.backend, bos_token=SPECIAL[1])


def _demand_alike(teacher: Any, base: Any, place: Path) -> None:
    """Both models must be the same but for their attention."""
    if base is None:
        return
    there, here = (
        {name: kind for name, kind in shapes(params_of(model)).items() if "/mixer/" not in name}
        for model in (teacher, base)
    )
    if phrases := differences(there, here):
        raise UserError(f"the teacher {place} is another model than that of init_from: {listed(phrases)}")
