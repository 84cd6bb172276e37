"""Training of the study: in memory, without validations on the way, and nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from lib.study.cells import Setup

from lin_jax.attention import AttentionConfig
from lin_jax.data import Corpus, DataConfig, Tokenizer, load_tokenizer, prepare_tokenizer
from lin_jax.models import CausalModel
from lin_jax.models.params import abstract_model, filled, new_params
from lin_jax.progress_bar import progress_bar
from lin_jax.recipe import IN_MEMORY, Recipe
from lin_jax.training import RunConfig
from lin_jax.training.hooks import Hook, Training
from lin_jax.training.initialization.base_and_teacher import BaseModel, Teacher
from lin_jax.training.model_source import with_attention
from lin_jax.training.monitoring.spike_response import SpikeResponse
from lin_jax.training.objectives.partial_training import initial_key
from lin_jax.training.objectives.registry import kind_of
from lin_jax.training.setup import ResolvedRun, resolve_in_memory
from lin_jax.training.train_step import StepMetrics
from lin_jax.training.trainer import Trainer


class _Unvalidated(Trainer):
    """A trainer that does not validate: a cell measures the trained model alone, and compiles less."""

    def evaluate(self) -> None:
        """Does nothing."""


class _Watch(Hook):
    """A bar with time left on a terminal, and the seconds of the steps, those of compiling left out."""

    def __init__(self, steps: int, description: str) -> None:
        self._bar = progress_bar(total=steps, unit="step", desc=description, leave=False)
        self._began = 0.0
        self.seconds = 0.0

    def on_compiled(self, training: Training) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """Moves the bar on."""
        self._bar.update()
        self.seconds = time.perf_counter() - self._began

    def on_end(self, training: Training) -> None:
        """Takes the bar away."""
        self._bar.close()


def train_resolved(run: ResolvedRun, description: str) -> tuple[Any, float]:
    """Takes all steps of a run: the parameters, and the seconds without those of compiling.

    Raises:
        UserError: the loss is no longer a number.
    """
    training, watch = run.config.training, _Watch(run.config.training.steps, description)
    hooks = [SpikeResponse(training.loss_spikes), watch]
    with jax.set_mesh(run.shardings.mesh):
        trainer = _Unvalidated(
            run.objective, run.step, run.state, run.frozen, run.batches, [], run.shardings, training, hooks
        )
        trainer.run()
    return trainer.state.params, watch.seconds


def train_recipe(
    runs: Sequence[RunConfig], model: CausalModel, tokenizer: Tokenizer, teacher: CausalModel | None = None
) -> tuple[CausalModel, float]:
    """Trains a causal model by the runs of a recipe, one after the other: the model, and the seconds."""
    seconds = 0.0
    for number, config in enumerate(runs, 1):
        taught = None if teacher is None else Teacher(teacher, tokenizer, "the teacher")
        run = resolve_in_memory(config, BaseModel(model, tokenizer), taught)
        params, spent = train_resolved(run, f"run {number} of {len(runs)}")
        model, seconds = run.objective.parts(params, run.frozen)[0], seconds + spent
    return model, seconds


def linearize_in_memory(
    setup: Setup, teacher: CausalModel, tokenizer: Tokenizer, attention: AttentionConfig, seed: int
) -> tuple[CausalModel, float]:
    """Linearizes a teacher by the recipe of `lin_jax.linearize`, with the budget of all students."""
    model = with_attention(teacher, attention)
    recipe = Recipe(model.config, stories(setup), batch_size=setup.sizes.batch, seed=seed)
    runs = recipe.linearize(setup.sizes.steps, lora=None, output=IN_MEMORY)
    return train_recipe(runs, model, tokenizer, teacher)


def stories(setup: Setup) -> DataConfig:
    """The text that students learn from."""
    sizes = setup.sizes
    return setup.places["stories"].data(sizes.length, 1, most=sizes.text_bytes)


def resolve_from_scratch(config: RunConfig, tokenizer: Tokenizer) -> ResolvedRun:
    """Prepares a run that begins from fresh parameters, with a tokenizer that is there already."""
    model, purpose = replace(config.model, vocab_size=tokenizer.vocab_size), kind_of(config).purpose
    params = new_params(model, initial_key(config.training.seed), purpose=purpose)
    base = BaseModel(filled(abstract_model(model, purpose), params), tokenizer)
    return resolve_in_memory(replace(config, model=model, init_from=IN_MEMORY), base)


def text_tokenizer(setup: Setup, name: str, data: DataConfig) -> Tokenizer:
    """The tokenizer of a text, which its first cell trains and all others share."""
    folder = setup.folder("tokenizers", name)
    if not folder.is_dir():
        train, _ = Corpus.open(data).split(data.validation_fraction)
        save_tokenizer(prepare_tokenizer(data, train), folder)
    return load_tokenizer(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer; the folder appears whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    tokenizer.save(partial)
    partial.replace(folder)
