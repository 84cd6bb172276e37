"""Inputs of a run: its tokenizer, and batches to train and to validate on, of text or of a task."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lin_jax.data import (
    Corpus,
    Document,
    Tokenizer,
    TrainingBatches,
    prepare_tokenizer,
    training_batches,
    validation_batches,
)
from lin_jax.data.glue.batches import (
    ExampleEncoder,
    ExampleRows,
    row_length,
    task_training_batches,
    task_validation_batches,
)
from lin_jax.data.glue.files import Example, read_examples
from lin_jax.data.glue.tasks import TRAIN, Task, glue_task
from lin_jax.data.sources.remote import given_by
from lin_jax.errors import UserError
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models import BertConfig, ModelConfig, T5Config
from lin_jax.training.config import RunConfig, TrainingConfig
from lin_jax.training.objectives.draft_vocabulary import count_tokens, frequent_tokens, tokens_as_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Tokenizer and batches of a run.

    Attributes:
        config: the run, with every size filled in.
        tokenizer: of the run.
        batches: training batches, from the first.
        validation: held-out batches.
    """

    config: RunConfig
    tokenizer: Tokenizer
    batches: TrainingBatches
    validation: Sequence[Batch]


def read_inputs(config: RunConfig, tokenizer: Tokenizer | None, rows: tuple[int, int]) -> Inputs:
    """Opens what a configuration describes.

    Args:
        config: the run.
        tokenizer: its tokenizer, if it has one before it begins: its own, resumed, or that of the model it starts
            from.
        rows: which rows of every training batch this process is to have: from, and to before.

    Raises:
        UserError: a source or tokenizer cannot be read, or does not fit the model.
    """
    if config.data.task is None:
        return _read_text(config, tokenizer, rows)
    return _read_task(config, glue_task(config.data.task), tokenizer, rows)


def held_out_batches(config: RunConfig, tokenizer: Tokenizer) -> list[Batch]:
    """The held-out text of a run in batches of its size."""
    _, held_out = Corpus.open(config.data).split(config.data.validation_fraction)
    tokenizer = tokenizer.within(config.model.vocab_size)
    return list(validation_batches(held_out, tokenizer, config.data, batch_size=config.training.batch_size))


def _read_text(config: RunConfig, known: Tokenizer | None, rows: tuple[int, int]) -> Inputs:
    with given_by("--data.mixture" if config.data.mixture else "--data.source"):
        train, held_out = Corpus.open(config.data).split(config.data.validation_fraction)
    with given_by("--data.tokenizer"):
        tokenizer = known or prepare_tokenizer(config.data, train)
    config = _with_vocabulary(config, tokenizer, of_model=known is not None)
    tokenizer = tokenizer.within(config.model.vocab_size)
    data, training = config.data, config.training
    sizes = {"batch_size": training.batch_size, "seed": training.seed}
    batches = training_batches(train, tokenizer, data, **sizes, rows=rows)
    # The same batches for all processes.
    config = _with_draft_tokens(
        config, lambda: training_batches(train, tokenizer, data, **sizes, rows=(0, training.batch_size))
    )
    validation = validation_batches(held_out, tokenizer, data, batch_size=training.batch_size)
    return Inputs(config, tokenizer, batches, validation)


def _read_task(config: RunConfig, task: Task, known: Tokenizer | None, wanted: tuple[int, int]) -> Inputs:
    (source,) = config.data.sources
    with given_by("--data.source"):
        train, *held_out = (read_examples(source, task, split) for split in (TRAIN, *task.held_out))
    with given_by("--data.tokenizer"):
        tokenizer = known or _task_tokenizer(config, train)
    config = _with_vocabulary(config, tokenizer, of_model=known is not None)
    encoder = task_encoder(config, task, tokenizer)
    segments = [encoder.segments(examples, config.data.sequence_length) for examples in (train, *held_out)]
    length = row_length(segments, config.data.sequence_length)
    rows, *held_out_rows = (
        ExampleRows(encoder, examples, each, length)
        for examples, each in zip((train, *held_out), segments, strict=True)
    )
    training = _with_steps(config.training, len(train))
    sizes = {"length": length, "batch_size": training.batch_size, "seed": training.seed}
    batches = task_training_batches(rows, train, tokenizer, **sizes, wanted=wanted)
    validation = task_validation_batches(held_out_rows, batch_size=training.batch_size)
    config = replace(config, training=training, data=replace(config.data, sequence_length=length))
    return Inputs(config, tokenizer, batches, validation)


def _task_tokenizer(config: RunConfig, examples: Sequence[Example]) -> Tokenizer:
    texts = [text for example in examples for text in example.sentences if text.strip()]
    return prepare_tokenizer(config.data, [Document(str(number), text) for number, text in enumerate(texts)])


def task_encoder(config: RunConfig, task: Task, tokenizer: Tokenizer) -> ExampleEncoder:
    """Builds the encoder of a task's examples for the run's model.

    Raises:
        UserError: the model's special tokens are not the tokenizer's.
    """
    model: ModelConfig = config.model
    if isinstance(model, T5Config) and model.end_token != tokenizer.eos_id:
        raise UserError(
            f"model.end_token is {model.end_token}, and the tokenizer's is {tokenizer.eos_id}; "
            "give model.end_token that, or the tokenizer of a T5"
        )
    pad = tokenizer.special_id("pad_token")
    if pad is None or pad >= (model.vocab_size or tokenizer.vocab_size):
        # A token for padding that was added to the tokenizer alone has no embedding; padding is masked.
        pad = getattr(model, "pad_token", 0)
    has_types = isinstance(model, BertConfig) and model.types > 1
    return ExampleEncoder(config.family, tokenizer.within(model.vocab_size), task, pad, has_types)


def _with_steps(training: TrainingConfig, examples: int) -> TrainingConfig:
    """Epochs as steps; each ends with a validation and a checkpoint."""
    if training.epochs is None:
        return training
    each = math.ceil(examples / training.batch_size)
    steps = math.ceil(training.epochs * examples / training.batch_size)
    return replace(training, steps=steps, evaluate_every=each, checkpoint_every=each)


def _with_draft_tokens(config: RunConfig, batches: Callable[[], TrainingBatches]) -> RunConfig:
    """Fills in the tokens that a path head with a trimmed vocabulary can guess, counted in the first batches."""
    heads, size = config.heads, config.model.vocab_size
    if heads.vocabulary is None or heads.tokens is not None or heads.vocabulary == size:
        return config
    assert size is not None, "filled in before"
    chosen = frequent_tokens(count_tokens(batches(), size), heads.vocabulary)
    return replace(config, heads=replace(heads, tokens=tokens_as_text(chosen)))


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer, *, of_model: bool) -> RunConfig:
    """Fills in the vocabulary's size; a model's own tokenizer may have more entries, such as one for padding."""
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size and of_model:
        log.warning(
            "the tokenizer has %d entries, the model %d: a text with one of those beyond is refused",
            tokenizer.vocab_size,
            size,
        )
    elif size is not None and size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it out to take that"
        )
    return replace(config, model=replace(config.model, vocab_size=size or tokenizer.vocab_size))
