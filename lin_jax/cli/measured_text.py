"""Text that commands measure a model on: what is named, or the held-out part of a run's own."""

import argparse
from dataclasses import replace
from typing import Any, NamedTuple

from lin_jax.data import Corpus, DataConfig, Tokenizer, validation_batches
from lin_jax.errors import UserError

# Batches of a text that is read whole.
ALL = 2**31


class MeasuredText(NamedTuple):
    """Batches of a text, and its name."""

    batches: list[dict[str, Any]]
    name: str


def read_measured_text(options: argparse.Namespace, tokenizer: Tokenizer, own: DataConfig | None) -> MeasuredText:
    """Reads the text that options say, in rows as in training.

    Args:
        options: with `model`, `text`, `sequence_length`, `batch` and `batches`; None takes the run's, or all.
        tokenizer: of the text.
        own: configuration of the text that the model was trained on; None if it is not known.

    Raises:
        UserError: a number is not positive, or there is no text.
    """
    data, documents = open_measured_text(options, own)
    return MeasuredText(list(validation_batches(documents, tokenizer, data, batch_size=options.batch)), data.name)


def open_measured_text(options: argparse.Namespace, own: DataConfig | None) -> tuple[DataConfig, Corpus]:
    """Opens the text that options say: its configuration and documents; arguments and errors as in the other."""
    for name in ("batch", "batches"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; give at least 1")
    if options.text is None and own is None:
        raise UserError(f"{options.model} is no run, and so has no held-out text; give a text with --text")
    data = own or DataConfig(sequence_length=512)
    if options.text is not None:
        data = DataConfig(options.text, sequence_length=data.sequence_length, validation_batches=ALL)
    if options.sequence_length is not None:
        data = replace(data, sequence_length=options.sequence_length)
    if options.batches is not None:
        data = replace(data, validation_batches=options.batches)
    documents = Corpus.open(data)
    if options.text is None:
        _, documents = documents.split(data.validation_fraction)
    return data, documents
