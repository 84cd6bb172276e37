"""Command `evaluate`: opens the model, and measures what is asked for."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from lin_jax.cli.evaluate.answers import choices_report, task_report
from lin_jax.cli.evaluate.perplexity import document_report, rows_report
from lin_jax.cli.evaluate.speed import peak_memory_bytes, speed_report
from lin_jax.data import Tokenizer
from lin_jax.devices import device_kind
from lin_jax.errors import UserError
from lin_jax.models import CausalModel
from lin_jax.training.model_source import ModelSource


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measures a model; returns the figures by name.

    Args:
        options: of `options.parse`.

    Raises:
        UserError: there is no such model, text or file of questions, or they do not go together.
    """
    device_kind()
    source = ModelSource.open(options.model, options.step)
    if source.is_run and source.run.data.task is not None:
        return task_report(source)
    source.check_holds_no_tokenizer(options.tokenizer)
    # Beyond the embedding, JAX would read its last row.
    tokenizer = source.tokenizer(options.tokenizer).within(source.config.vocab_size)
    subject = Subject(source, tokenizer, _causal(source, options.model))
    return {**_report(options)(options, subject), "peak_memory_bytes": peak_memory_bytes()}


class Subject(NamedTuple):
    """A causal model that is measured, where it is from, and its tokenizer."""

    source: ModelSource
    tokenizer: Tokenizer
    model: CausalModel


def _report(options: argparse.Namespace) -> Callable[[argparse.Namespace, Any], dict[str, Any]]:
    if options.speed:
        return speed_report
    if options.choices is not None:
        return choices_report
    return rows_report if options.context == "rows" else document_report


def _causal(source: ModelSource, name: str) -> CausalModel:
    model = source.model()
    if not isinstance(model, CausalModel):
        raise UserError(f"{name} holds a {type(model).__name__}, which predicts no text; give a causal model")
    return model
