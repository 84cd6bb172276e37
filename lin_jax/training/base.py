"""What a run begins from: the model of another run, of a Hugging Face folder, or of a file of llama2.c."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.data.config import HUB_PREFIX
from lin_jax.errors import UserError
from lin_jax.hub.files import resolve
from lin_jax.hub.pretrained import Pretrained
from lin_jax.models.registry import ModelFamily, family_of_config, model_class
from lin_jax.training.config import RunConfig
from lin_jax.training.loading import base_types, is_pretrained, load_any, read_base
from lin_jax.training.objectives import OBJECTIVES, keeps_base
from lin_jax.training.parameters import Params, fingerprint
from lin_jax.training.teacher import load_tokenizer_of

# How numbers are kept and a model is computed: what a run says of its model itself, even where a checkpoint says the
# rest. Its attention is another such thing.
_COMPUTED = ("dtype", "param_dtype", "remat", "remat_keeps", "unroll")


@dataclass(frozen=True)
class Base:
    """A trained model to start from.

    Attributes:
        place: its run folder or Hugging Face folder, or file of llama2.c.
        tokenizer: its tokenizer.
        step: of its checkpoint; 0 if it is not of a run.
        model: the model.
    """

    place: Path
    tokenizer: Tokenizer
    step: int
    model: Any

    def reference(self, run: Path, frozen: Params) -> dict[str, Any]:
        """What checkpoints say of the model under what learns; the path is relative, so that runs move together."""
        path = os.path.relpath(self.place.absolute(), run.absolute())
        return {"run": path, "step": self.step, "fingerprint": fingerprint(frozen)}


def load_base(config: RunConfig, resume: bool, shardings: Callable[..., jax.sharding.Sharding]) -> Base | None:
    """The model that a run begins from, or stands on; None if it needs none, or no longer.

    Args:
        config: the run, with the options of its base.
        resume: whether the run has begun already.
        shardings: of the model's variables, by path and shape, where they are read one by one.

    Raises:
        UserError: there is no such model, or the run cannot begin from it.
    """
    if config.init_from is None or (resume and not keeps_base(config)):
        return None
    kind, place = OBJECTIVES[config.objective], _resolved(config.init_from)
    # Heads stand on the model as it is stored; a model that goes on learning may do so in another type.
    types = base_types(config) if kind.has_model else {}
    # What stands on a frozen model goes on with the very one that it began with, even if its own run has gone on since.
    step = read_base(config.output).step if resume else None
    model, step = load_any(place, step, head=kind.purpose, types=types, shardings=shardings)
    _check_family(config, family_of_config(model.config), place)
    if not kind.has_model and not isinstance(model, model_class(model.config, kind.purpose)):
        raise UserError(f"init_from {place} holds a {type(model).__name__}, which heads cannot stand on")
    return Base(place, load_tokenizer_of(place, config.data.tokenizer), step, model)


def with_options_of_base(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of the checkpoint that it starts from, if that is not a run's.

    Only how tokens are mixed and how the model is computed are the run's own to say.

    Raises:
        UserError: the checkpoint cannot be opened, or is of another family.
    """
    if config.init_from is None or not is_pretrained(_resolved(config.init_from)):
        return config
    kind, place = OBJECTIVES[config.objective], _resolved(config.init_from)
    sizes = Pretrained.open(place).model.config
    _check_family(config, family_of_config(sizes), place)
    if not kind.has_model:
        return replace(config, family=family_of_config(sizes).name, model=sizes)
    return replace(config, model=replace(sizes, **own_options(config.model)))


def own_options(model: Any) -> dict[str, Any]:
    """Those options of a model that are a run's own to say, whatever it begins from: attention, types, computation."""
    mixers = [each.name for each in fields(model) if isinstance(getattr(model, each.name), AttentionConfig)]
    return {name: getattr(model, name) for name in (*mixers, *_COMPUTED) if hasattr(model, name)}


def _resolved(place: str) -> Path:
    return resolve(place) if place.startswith(HUB_PREFIX) else Path(place)


def _check_family(config: RunConfig, family: ModelFamily, place: Path) -> None:
    kind = OBJECTIVES[config.objective]
    if kind.has_model and family.name != config.family:
        raise UserError(
            f"init_from {place} holds a {family.name}, and the family of this run is {config.family}; "
            f"give family {family.name}"
        )
    if kind.purpose not in family.models:
        raise UserError(
            f"init_from {place} holds a {family.name}, which has no model for {kind.purpose}, as objective "
            f"'{config.objective}' needs; give another folder"
        )
