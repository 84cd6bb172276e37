"""Command `evaluate`: perplexity of a model on text."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lin_jax.cli.json_line import json_line
from lin_jax.cli.measured_text import read_measured_text
from lin_jax.errors import OptionParser, UserError
from lin_jax.progress_bar import progress_bar
from lin_jax.training.checkpoint.selector import parse_selector


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
    batches, name = read_measured_text(options, tokenizer, source.run.data if source.is_run else None)
    model = source.model()
    if not isinstance(model, CausalModel):
        raise UserError(f"{options.model} holds a {type(model).__name__}, which predicts no text; give a causal model")

    def shown() -> Iterator[dict[str, Any]]:
        with progress_bar(total=len(batches), desc="evaluating", unit="batch") as bar:
            for batch in batches:
                yield batch
                bar.update()

    found = evaluate(model, shown())
    print(json_line({"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens, "text": name}))
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
