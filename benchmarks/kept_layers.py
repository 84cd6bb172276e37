"""A student with its teacher's attention back in one layer at a time: perplexity over the teacher's, for each layer.

    python benchmarks/kept_layers.py STUDENT --teacher PLACE [--text PLACE] [--batches N] [--json FILE]

`python -m lin_jax select-layers` chooses by the divergence from the teacher, and writes a recipe; here are the ratios
of perplexities beside the divergences, so that its choice can be set beside the middle layer. Nothing is trained. After
attention transfer, in which every layer learns apart from the others, that is also what a student with softmax in this
layer comes to; after tuning, a student that had it from the start may come to more.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from lib.report import header

from lin_jax.cli.measured_text import read_measured_text
from lin_jax.errors import OptionParser, exit_cleanly
from lin_jax.evaluation.layer_selection import NONE, hidden_with
from lin_jax.losses.cross_entropy import Batch, inputs_of, shifted_targets
from lin_jax.models import CausalModel
from lin_jax.training.model_source import ModelSource


def main() -> int:
    """Measures and prints; writes JSON if asked to."""
    options = parse()
    source = ModelSource.open(options.model)
    student, teacher = source.model(), ModelSource.open(options.teacher).model()
    tokenizer, data = source.tokenizer(options.tokenizer), source.run.data if source.is_run else None
    batches, text = read_measured_text(options, tokenizer, data)
    layers = [NONE, *range(student.config.num_layers)]
    sums, tokens = [0.0, *(0.0 for _ in layers)], 0
    divergences = [0.0 for _ in layers]
    for batch in batches:
        hidden, theirs, count = taught(teacher, dict(batch))
        tokens += int(count)
        sums[0] += float(theirs)
        for at, layer in enumerate(layers):
            loss, divergence = restored(student, teacher, dict(batch), hidden, jnp.asarray(layer))
            sums[1 + at] += float(loss)
            divergences[at] += float(divergence)
    rows = [
        {"layer": layer, "ratio": math.exp((loss - sums[0]) / tokens), "divergence": divergence / tokens}
        for layer, loss, divergence in zip(layers, sums[1:], divergences, strict=True)
    ]
    print(f"{tokens:,} tokens of {text}; teacher's perplexity {math.exp(sums[0] / tokens):.4f}")
    for row in rows:
        name = "no layer" if row["layer"] == NONE else f"layer {row['layer']}"
        print(f"{name}: {row['ratio']:.4f} times the teacher's, divergence {row['divergence']:.4f}")
    if options.json:
        options.json.write_text(json.dumps(header("kept_layers") | {"tokens": tokens, "layers": rows}, indent=1))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="STUDENT", help="run folder or Hugging Face folder")
    parser.add_argument("--teacher", required=True, metavar="PLACE", help="run, Hugging Face folder or llama2.c file")
    parser.add_argument("--text", metavar="PLACE", help="text to measure on (default: the student's held-out text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of rows (default: as in training)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows in a batch")
    parser.add_argument("--batches", type=int, metavar="N", help="batches at the most (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


@jax.jit
def taught(teacher: CausalModel, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The teacher's hidden vectors `[B, T, E]`, the sum of its losses, and the number of predicted tokens."""
    hidden, targets = teacher.hidden(*inputs_of(batch)), shifted_targets(batch, 1)
    return hidden, losses(teacher.logits(hidden), targets), jnp.sum(targets.included)


@jax.jit
def restored(
    student: CausalModel, teacher: CausalModel, batch: Batch, hidden: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of losses and of KL(teacher || student), with the teacher's attention in one layer."""
    targets, normal = shifted_targets(batch, 1), partial(jax.nn.log_softmax, axis=-1)
    own = normal(student.logits(hidden_with(student, teacher, batch, layer)))
    theirs = normal(teacher.logits(hidden))
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)
    return losses(own, targets), jnp.sum(jnp.where(targets.included, divergence, 0))


def losses(logits: jax.Array, targets: Any) -> jax.Array:
    """The sum of cross entropies of predicted tokens."""
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets.ids[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets.included, own, 0))


if __name__ == "__main__":
    exit_cleanly(main)
