"""Trained models, wherever they are: run folders, Hugging Face folders or repositories, files of llama2.c."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.data.sources.remote import MODEL, fetch_file, given_by, is_remote, is_remote_file
from lin_jax.data.tokenizers.sentencepiece import SPECIAL, read_sentencepiece
from lin_jax.errors import UserError
from lin_jax.hub.files import find_checkpoint, generation_ends, is_checkpoint_folder, read_config
from lin_jax.hub.load import HubCheckpoint, Pretrained
from lin_jax.models import CausalModel, MedusaHeads, PathHead
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.params import Params, params_fingerprint, params_of
from lin_jax.models.stored_weights import Storage
from lin_jax.training.checkpoint.files import read_metadata
from lin_jax.training.checkpoint.loading import BaseRun, read_base, read_run_params
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.config import CONFIG_FILE, RunConfig
from lin_jax.training.config_file import load_run_config
from lin_jax.training.objectives import NextToken, PartialTraining, initial_key
from lin_jax.training.objectives.objective import Objective
from lin_jax.training.objectives.registry import keeps_base, kind_of, objective_of

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class RunParts:
    """The model and the heads of a run's checkpoint, each None if it trains none, and the checkpoint's step."""

    model: Any
    heads: MedusaHeads | PathHead | None
    step: int


class ModelSource:
    """A place that holds a trained model; its configuration, and headers of its tensors, are read once.

    Args:
        place: run folder, Hugging Face folder, or file of llama2.c.
        selector: the checkpoint of a run; None takes the newest that can be read.

    Attributes:
        place: as above.
        selector: as above.
    """

    def __init__(self, place: Path, selector: CheckpointSelector = None) -> None:
        self.place = place
        self.selector = selector

    @classmethod
    def open(cls, place: str | Path, selector: CheckpointSelector = None) -> "ModelSource":
        """Opens a run folder, a Hugging Face folder or a file of llama2.c; or fetches it, by `hub:` or `https://`.

        Raises:
            UserError: there is no such place, or a selector is given for one that has no steps.
        """
        name = str(place)
        source = cls(find_checkpoint(name) if is_remote(name) else Path(name).expanduser(), selector)
        if not source.place.exists():
            raise UserError(
                f"there is no folder {place}; give the output of a train.py run, a Hugging Face folder, "
                "hub:OWNER/NAME, or a file of llama2.c"
            )
        if selector is not None and not source.is_run:
            raise UserError(f"{place} is a Hugging Face checkpoint, which has no steps; leave the step out")
        return source

    @property
    def is_run(self) -> bool:
        """True for the output folder of a run, False for a Hugging Face folder or a file of llama2.c."""
        return not self.place.is_file() and not is_checkpoint_folder(self.place)

    @cached_property
    def run(self) -> RunConfig:
        """The configuration of the run.

        Raises:
            UserError: the place is no run folder.
        """
        return load_run_config(self.place)

    @cached_property
    def checkpoint(self) -> HubCheckpoint:
        """`config.json` and headers of the tensors of a Hugging Face folder or a file of llama2.c."""
        return HubCheckpoint.open(self.place)

    @property
    def rounded(self) -> bool:
        """True for a Hugging Face folder with int8 weights."""
        return not self.is_run and self.checkpoint.rounded

    @cached_property
    def config(self) -> Any:
        """Configuration of the model, in the types in which it is stored."""
        return self.run.model if self.is_run else Pretrained.of(self.checkpoint).model.config

    @cached_property
    def step(self) -> int:
        """Step of the run's checkpoint that was read; 0 for a place that is no run."""
        return self._parts.step if self.is_run else 0

    def model(
        self,
        *,
        attention: AttentionConfig | None = None,
        purpose: str | None = None,
        compute: ComputeConfig | None = None,
        shardings: Any = None,
        seed: int = 0,
        storage: Callable[[Any], Storage] | None = None,
    ) -> Any:
        """Reads the model.

        Args:
            attention: another attention than its own; what that adds is initialized from `seed`.
            purpose: what a Hugging Face checkpoint's model is for; None is what its folder says.
            compute: types of a Hugging Face checkpoint's model; None takes what is stored.
            shardings: sharding of each variable of a Hugging Face checkpoint's model, as in `hub.from_pretrained`.
            seed: of what another attention adds.
            storage: of a Hugging Face checkpoint's model that only decodes, as in `hub.load.Pretrained.load`.

        Raises:
            UserError: the place holds no model, or a damaged one.
        """
        if not self.is_run:
            opened = Pretrained.of(self.checkpoint, attention=attention, head=purpose, compute=compute)
            return opened.load(shardings=shardings, seed=seed, storage=storage)
        kind = kind_of(self.run)
        if not kind.trains.has_model:
            raise UserError(f"{self.place} holds {kind.heads_name}, not a model; its model is in {self.base.folder}")
        model = self._parts.model
        return model if attention is None else with_attention(model, attention, seed)

    def heads(self, model: CausalModel | None = None) -> MedusaHeads | PathHead:
        """Reads the draft heads of a run.

        Args:
            model: what the heads are to be used with, to make sure that they were trained on it.

        Raises:
            UserError: the run holds no heads or no such checkpoint, or the heads were trained on another model.
        """
        trains = kind_of(self.run).trains
        if not trains.has_heads:
            raise UserError(
                f"{self.place} holds no draft heads; train some with objective medusa or path, init_from {self.place}"
            )
        if model is not None and not trains.has_model:
            self._demand_same(model, self.base.fingerprint, f"step {self.base.step} of {self.base.folder}")
        parts = self._parts
        if model is not None and parts.model is not None:
            own = params_fingerprint(params_of(parts.model))
            self._demand_same(model, own, f"the model beside them at step {parts.step}")
        assert parts.heads is not None, "the objective trains heads"
        return parts.heads

    def unmerged(self) -> Any:
        """Reads the model of a run with its adapters on it, not merged.

        Raises:
            UserError: there is no such run or checkpoint, or it holds no adapters.
        """
        if self.run.adapters is None:
            raise UserError(f"{self.place} holds no adapters; leave --adapters out, or train some with 'adapters'")
        objective = objective_of(self.run)
        params, found = read_run_params(self.place, self.selector, objective.shapes())
        assert isinstance(objective, PartialTraining), "as a run with adapters has"
        return objective.unmerged(params, self._frozen(objective, found))[0]

    @property
    def base(self) -> BaseRun:
        """The frozen model that the trained parameters of a run stand on.

        Raises:
            UserError: nothing in the run stands on a frozen model.
        """
        return self._found(read_base(self.place, self.selector if isinstance(self.selector, int) else None))

    def tokenizer(self, named: str | None = None, *, option: str = "--tokenizer") -> Tokenizer:
        """Reads the tokenizer.

        A file of llama2.c holds none: it is a file of its own. Those models begin every text with a token and end none.

        Args:
            named: folder or file of the tokenizer, for a file of llama2.c.
            option: the option that names it, for messages.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if not self.place.is_file():
            return load_tokenizer(self.place / TOKENIZER_FOLDER if self.is_run else self.place)
        if named is None:
            raise UserError(f"{self.place} holds no tokenizer; say where it is with {option} FILE")
        with given_by(option):
            if Path(named).is_dir() or (is_remote(named) and not is_remote_file(named)):
                return load_tokenizer(named)
            file = fetch_file(named, MODEL) if is_remote(named) else Path(named)
        found = read_sentencepiece(file, self.config.vocab_size)
        return Tokenizer(found.backend, bos_token=SPECIAL[1])

    def check_holds_no_tokenizer(self, named: str | None) -> None:
        """Refuses a tokenizer that is named for a folder, which has one of its own.

        Raises:
            UserError: one is named, and this is a folder.
        """
        if named is not None and not self.place.is_file():
            raise UserError(f"{self.place} has a tokenizer of its own, and {named} is not read; leave --tokenizer out")

    def end_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that end a text: all that `generation_config.json`, `config.json` and the tokenizer name as such.

        A run has those of the model that it began from, in a file beside its tokenizer.
        """
        if self.place.is_file():
            # Texts of llama2.c follow each other, and each begins with this token.
            return () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        if self.is_run:
            said = [*generation_ends(self.place / TOKENIZER_FOLDER)]
        else:
            own = read_config(self.place).get("eos_token_id")
            said = [*generation_ends(self.place), *(own if isinstance(own, list) else [own])]
        return tuple(dict.fromkeys(token for token in (*said, tokenizer.eos_id) if token is not None))

    def reference(self, run: Path, frozen: Params) -> dict[str, Any]:
        """Refers to this model from the checkpoints of a run; by a relative path, so that runs move together."""
        path = os.path.relpath(self.place.absolute(), run.absolute())
        return {"run": path, "step": self.step, "fingerprint": params_fingerprint(frozen)}

    @cached_property
    def _parts(self) -> RunParts:
        objective = objective_of(self.run)
        params, found = read_run_params(self.place, self.selector, objective.shapes())
        frozen: Params = {}
        if kind_of(self.run).trains.has_model and keeps_base(self.run):
            frozen = self._frozen(objective, found)
        return RunParts(*objective.parts(params, frozen), found)

    def _frozen(self, objective: Objective, step: int) -> Params:
        base = self._found(read_base(self.place, step))
        model = ModelSource(base.folder, base.step).model(compute=self.run.model.compute)
        frozen = objective.frozen(model)
        if params_fingerprint(frozen) != base.fingerprint:
            raise UserError(
                f"what was trained in {self.place} stands on step {base.step} of {base.folder}, and that is another "
                "model by now; put the old one back"
            )
        return frozen

    def _found(self, base: BaseRun) -> BaseRun:
        """The base where it is now: where it was when the run began, seen from the run, or as `init_from` has it.

        Raises:
            UserError: it is in neither place.
        """
        named = self.run.init_from
        places = [base.folder]
        if named is not None and not base.folder.exists():
            places.append(find_checkpoint(named) if is_remote(named) else Path(named).expanduser())
        for place in places:
            if place.exists():
                return replace(base, folder=place)
        raise UserError(
            f"what was trained in {self.place} stands on the model in {base.folder}, which is not there; put it back, "
            f"or a link to where it is now"
        )

    def _demand_same(self, model: CausalModel, expected: str, owner: str) -> None:
        if params_fingerprint(params_of(model)) != expected:
            raise UserError(
                f"the heads in {self.place} belong to {owner}, and this is another model; "
                "load that one, or train heads on this one"
            )


def with_attention(model: CausalModel, attention: AttentionConfig, seed: int = 0) -> CausalModel:
    """A causal model's weights under another attention; what that adds is initialized from a seed."""
    objective = NextToken(replace(model.config, attention=attention))
    return objective.parts(objective.start(initial_key(seed), model), {})[0]


def holds_heads(folder: str | Path) -> bool:
    """True for the folder of a run whose model was trained together with draft heads."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).exists():
        return False
    trains = kind_of(load_run_config(folder)).trains
    return trains.has_model and trains.has_heads


def load_model(run_folder: str | Path, step: CheckpointSelector = None) -> tuple[Any, RunConfig, int]:
    """Reads the model of a run: the model, the run's configuration, and the step of its checkpoint.

    Args:
        run_folder: output of a train.py run.
        step: the checkpoint; None takes the newest that is whole, "best" the one with the lowest validation loss.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or the run holds heads, not a model.
    """
    source = ModelSource(Path(run_folder), step)
    return source.model(), source.run, source.step


def load_heads(
    run_folder: str | Path, step: CheckpointSelector = None, *, model: CausalModel | None = None
) -> MedusaHeads | PathHead:
    """Reads the draft heads of a run; arguments and errors as in `ModelSource`."""
    return ModelSource(Path(run_folder), step).heads(model)


def check_tokenizer(source: ModelSource, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that is not the one that a run's model was trained with.

    Raises:
        UserError: it is another one.
    """
    if tokenizer.fingerprint != read_metadata(source.place, source.step).tokenizer:
        raise UserError(
            f"the tokenizer in {source.place / TOKENIZER_FOLDER} is not the one that the model was trained with; "
            "put that one there"
        )
