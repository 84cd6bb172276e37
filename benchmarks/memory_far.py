"""A student's memory at positions beyond its training: rows as long as in training, whose first position moves.

    python benchmarks/memory_far.py STUDENT... --teacher PLACE [--text PLACE] [--shift N ...] [--json FILE]

Behind rotary positions, softmax sees only how far a query and a key lie apart: a teacher, and a window alone, say the
same wherever a row begins. A memory reads keys as they were turned by their own positions, so that it can tell. Rows
that are no longer than in training, at positions that are, show what new positions do; what is lost in long rows beyond
that comes from their length. For each first position: perplexity over the teacher's of all tokens, and of those that
something lies before the window of. Rows are one text each. Nothing is trained.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from lib.report import header

from lin_jax.attention import single_rows
from lin_jax.cli.measured_text import open_measured_text
from lin_jax.data import validation_batches
from lin_jax.errors import OptionParser, exit_cleanly
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models import CausalModel
from lin_jax.training.model_source import ModelSource


def main() -> int:
    """Measures and prints; writes JSON if asked to."""
    options = parse()
    sources = {place: ModelSource.open(place) for place in options.students}
    first = next(iter(sources.values()))
    options.model = options.students[0]
    data, documents = open_measured_text(options, first.run.data if first.is_run else None)
    data = replace(data, separate_documents=False)
    batches = list(validation_batches(documents, first.tokenizer(options.tokenizer), data, batch_size=options.batch))
    reference = losses(ModelSource.open(options.teacher).model(), batches, 0)
    print(f"{reference.size:,} tokens of {data.name}; teacher's perplexity {math.exp(reference.mean()):.4f}")
    rows: list[dict[str, Any]] = []
    for place, source in sources.items():
        model = source.model()
        begin = options.beyond if options.beyond is not None else model.config.attention.window or 0
        for shift in options.shift:
            lost = losses(model, batches, shift) - reference
            row = {"student": place, "shift": shift, "nats": lost.mean(), "nats_beyond": lost[:, begin:].mean()}
            rows.append(row)
            print(
                f"{place}, from position {shift:,}: {math.exp(row['nats']):.4f} times the teacher's, "
                f"{math.exp(row['nats_beyond']):.4f} from the row's token {begin} on",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(header("memory_far") | {"rows": rows}, indent=1, default=float))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="STUDENT", help="run folders or Hugging Face folders")
    parser.add_argument("--teacher", required=True, metavar="PLACE")
    parser.add_argument("--text", metavar="PLACE", help="text to measure on (default: the student's held-out text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--shift", nargs="+", type=int, default=[0, 1024, 2048], metavar="N", help="first positions")
    parser.add_argument(
        "--beyond", type=int, metavar="N", help="first token of the second figure (default: the window)"
    )
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of rows (default: as in training)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="rows in a batch")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches of the text")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def losses(model: CausalModel, batches: Iterable[Batch], shift: int) -> Float[np.ndarray, "N T"]:
    """Losses of all tokens, in nats, of rows that begin at a position."""
    at = jnp.asarray(shift)
    return np.concatenate([np.asarray(_losses(model, jnp.asarray(each["tokens"]), at), np.float64) for each in batches])


@jax.jit
def _losses(model: CausalModel, tokens: Array, shift: Array) -> Float[Array, "B T"]:
    layout = single_rows(tokens[:, :-1].shape, None)
    x, context = model.begin(tokens[:, :-1], layout.positions + shift)
    x, _ = model.run(lambda block, x, _: block.parallel(x, context, layout, None), x, None)
    logits = model.logits(model.outputs(x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


if __name__ == "__main__":
    exit_cleanly(main)
