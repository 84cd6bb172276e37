"""Command `evaluate`: perplexity of a model on text."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lin_jax.cli.json_line import json_line
from lin_jax.data import Corpus, DataConfig, validation_batches
from lin_jax.errors import OptionParser, UserError
from lin_jax.progress_bar import progress_bar
from lin_jax.training.checkpoint.selector import parse_selector

_ALL = 2**31


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Help and wrong options need not wait for the checkpoint library.
    from lin_jax.devices import device_kind
    from lin_jax.evaluation.perplexity import evaluate
    from lin_jax.models import CausalModel
    from lin_jax.training.model_source import ModelSource

    device_kind()
    source = ModelSource.open(options.model, options.step)
    # Beyond the embedding, JAX would read its last row.
    tokenizer = source.tokenizer(options.tokenizer).within(source.config.vocab_size)
    data = _data(options, source.run.data if source.is_run else None)
    documents = Corpus.open(data)
    if options.text is None:
        _, documents = documents.split(data.validation_fraction)
    batches = list(validation_batches(documents, tokenizer, data, batch_size=options.batch))
    model = source.model()
    if not isinstance(model, CausalModel):
        raise UserError(f"{options.model} holds a {type(model).__name__}, which predicts no text; give a causal model")

    def shown() -> Iterator[dict[str, Any]]:
        with progress_bar(total=len(batches), desc="evaluating", unit="batch") as bar:
            for batch in batches:
                yield batch
                bar.update()

    found = evaluate(model, shown())
    print(json_line({"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens, "text": data.name}))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m lin_jax evaluate",
        description="Measures the perplexity of a causal model on text: one line of JSON.",
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, Hugging Face folder, or file of llama2.c")
    parser.add_argument("--text", metavar="PLACE", help="file or folder of text (default: the run's held-out text)")
    parser.add_argument("--step", type=parse_selector, metavar="N|best", help="checkpoint of the run")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens read at once (default: the run's, or 512)"
    )
    parser.add_argument("--batches", type=int, metavar="N", help="batches read at the most (default: all of the text)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in a batch (default: 8)")
    return parser.parse_args(argv)


def _data(options: argparse.Namespace, own: DataConfig | None) -> DataConfig:
    """The text to measure on, cut as the options say."""
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; give at least 1")
    if options.text is None and own is None:
        raise UserError(f"{options.model} is no run, and so has no held-out text; give a text with --text")
    data = own or DataConfig(sequence_length=512)
    if options.text is not None:
        data = DataConfig(options.text, sequence_length=data.sequence_length, validation_batches=_ALL)
    if options.sequence_length is not None:
        data = replace(data, sequence_length=options.sequence_length)
    return data if options.batches is None else replace(data, validation_batches=options.batches)
