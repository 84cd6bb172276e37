"""Command `evaluate`: its options."""

import argparse
import sys
from collections.abc import Sequence

from lin_jax.cli.json_line import json_line
from lin_jax.errors import OptionParser, UserError
from lin_jax.training.checkpoint.selector import parse_selector

# Ways to read a text: what comes before a token that is predicted.
CONTEXTS = ("rows", "document", "sliding")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    # Help and wrong options need not wait for JAX.
    from lin_jax.cli.evaluate.command import evaluate

    print(json_line(evaluate(options)))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options of a command line.

    Raises:
        UserError: an option is unknown or has a wrong value, or two exclude each other.
        SystemExit: help was asked for.
    """
    parser = OptionParser(
        prog="python -m lin_jax evaluate",
        description="Measures a model, and prints one line of JSON: the perplexity of a causal model on text, its "
        "answers to questions (--choices), its speed and memory on this machine (--speed); of a run with objective "
        "classification, the metrics of its task.",
        epilog="Examples: evaluate runs/demo/teacher; evaluate FOLDER --text book.txt --context document; evaluate "
        "FOLDER --choices questions.jsonl; evaluate FOLDER --speed --batch 1. Tasks of the lm-evaluation-harness: "
        "python -m lin_jax lm-eval.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, Hugging Face folder, hub:OWNER/NAME, or file of llama2.c"
    )
    parser.add_argument("--step", type=parse_selector, metavar="N|best", help="checkpoint of the run")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in a batch (default: 8)")
    _add_text(parser.add_argument_group("perplexity"))
    other = parser.add_argument_group("in place of perplexity")
    other.add_argument(
        "--choices",
        metavar="FILE",
        help='file of questions, a line of JSON each: {"prompt": TEXT, "choices": [TEXT, ...], "answer": NUMBER '
        "from 0}; accuracy by the probability of the choices, and by that a byte",
    )
    other.add_argument("--speed", action="store_true", help="tokens read and written a second, and memory")
    other.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens that --speed writes (default: 64)"
    )
    options = parser.parse_args(argv)
    _check(options)
    return options


def _add_text(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--text", metavar="PLACE", help="file or folder of text (default: the run's held-out text)")
    group.add_argument(
        "--context",
        choices=CONTEXTS,
        default="rows",
        help="what comes before a token: rows are pieces of --sequence-length tokens, as in training; document is all "
        "of its text, which a state of constant size reads in constant memory; sliding is a window of "
        "--sequence-length tokens that moves by --stride (default: rows)",
    )
    group.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens of a row or window (default: the run's, or 512)"
    )
    group.add_argument("--stride", type=int, metavar="N", help="tokens scored in a window (default: half of it)")
    group.add_argument("--batches", type=int, metavar="N", help="batches of rows, at the most (default: all)")
    group.add_argument("--documents", type=int, metavar="N", help="texts of document and sliding, at the most")


def _check(options: argparse.Namespace) -> None:
    for name in ("sequence_length", "stride", "batches", "documents", "batch", "new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if options.choices is not None and options.speed:
        raise UserError("--choices and --speed are both given; give one of them")
    if options.stride is not None and options.context != "sliding":
        raise UserError(f"--stride is for --context sliding, not {options.context}; leave it out")
    if options.context == "rows" and options.documents is not None:
        raise UserError("--documents is for --context document or sliding; give --batches for rows")
    if options.context != "rows" and options.batches is not None:
        raise UserError(f"--batches is for --context rows, not {options.context}; give --documents")
