"""A memory before any training: its share of the attention beside the teacher's, fitted and not, and the perplexity.

    python benchmarks/memory_start.py TEACHER --text PLACE [--attention NAME ...] [--window N] [--json FILE]

The teacher's attention gets a window and a memory, as attention transfer begins with. For each layer and query head:
the share of the teacher's softmax that lies outside of the window, the memory's share of the normaliser as it is drawn,
and as it is fitted to the teacher (`transfer.fit_memory`) from the first rows of the text, which are not measured on.
Then perplexity over the teacher's, with the window alone beside it. Nothing is trained.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from lib.report import header

from lin_jax.attention import AttentionConfig
from lin_jax.cli.measured_text import read_measured_text
from lin_jax.errors import OptionParser, exit_cleanly
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.training.initialization.fitted_start import fitted_start
from lin_jax.training.model_source import ModelSource, with_attention


def main() -> int:
    """Measures and prints; writes JSON if asked to."""
    options = parse()
    source = ModelSource.open(options.model)
    teacher = source.model()
    tokenizer, data = source.tokenizer(options.tokenizer), source.run.data if source.is_run else None
    (first, *batches), text = read_measured_text(options, tokenizer, data)
    reference = evaluate(teacher, batches)
    print(f"{reference.tokens:,} tokens of {text}; teacher's perplexity {reference.perplexity:.4f}")

    def ratio(model: Any) -> float:
        return math.exp(evaluate(model, batches).loss - reference.loss)

    window = ratio(with_attention(teacher, AttentionConfig("softmax", window=options.window)))
    print(f"softmax over the last {options.window} alone: {window:.4f} times the teacher's")
    rows = []
    for name in options.attention:
        attention = AttentionConfig(name, window=options.window, features=options.features)
        student = with_attention(teacher, attention, options.seed)
        found = fitted_start(student, teacher, first, None, options.seed)
        for layer, shares in found.shares.items():
            for part, each in zip(shares._fields, shares, strict=True):
                heads = " ".join(f"{share:7.5f}" for share in np.ravel(each))
                print(f"{name}, layer {layer}, {part:8}: {heads}")
        before, after = ratio(student), ratio(found.model)
        print(f"{name}: {before:.4f} times the teacher's as drawn, {after:.4f} fitted")
        shares = {
            str(layer): {part: np.ravel(each).tolist() for part, each in zip(own._fields, own, strict=True)}
            for layer, own in found.shares.items()
        }
        rows.append({"attention": name, "drawn": before, "fitted": after, "shares": shares})
    if options.json:
        options.json.write_text(json.dumps(header("memory_start") | {"window": window, "rows": rows}, indent=1))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="TEACHER", help="run folder, Hugging Face folder or llama2.c file")
    parser.add_argument("--text", metavar="PLACE", help="text to measure on (default: the model's held-out text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--attention", nargs="+", metavar="NAME", default=["clustered+window", "exponential+window"])
    parser.add_argument("--window", type=int, default=16, metavar="N", help="tokens of the window")
    parser.add_argument("--features", type=int, metavar="N", help="features (default: twice the head's size)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of rows (default: as in training)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows in a batch")
    parser.add_argument("--batches", type=int, default=9, metavar="N", help="batches, one of them to fit to")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    exit_cleanly(main)
