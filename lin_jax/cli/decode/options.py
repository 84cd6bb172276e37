"""Command `decode`: its options."""

import argparse
import sys
from collections.abc import Sequence

from lin_jax.errors import OptionParser
from lin_jax.training.checkpoint.selector import parse_selector


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    # Help and wrong options need not wait for JAX.
    from lin_jax.cli.decode.command import decode
    from lin_jax.user_cache import keep_programs

    if not options.no_cache:
        keep_programs()
    return decode(options)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options of a command line.

    Raises:
        UserError: an option is unknown or has a wrong value.
        SystemExit: help was asked for.
    """
    parser = OptionParser(
        prog="python -m lin_jax decode",
        description="Goes on from prompts with a trained model, plainly or with lossless speculation: the text is "
        "the same, only the time differs.",
        epilog="Ctrl-C ends a text early and shows what there is.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, Hugging Face folder, hub:OWNER/NAME, or file of llama2.c"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c, which holds none")
    parser.add_argument(
        "--step",
        type=parse_selector,
        metavar="N|best",
        help="checkpoint of the run: its step, or that of the lowest validation loss (default: the newest)",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="text to go on from")
    text.add_argument(
        "--prompt-file",
        metavar="F",
        help="file with the prompt, taken as it is, last newline included, or - for standard input; or .jsonl with a "
        "field 'prompt' a line",
    )
    _add_numbers(parser.add_argument_group("what is computed with"))
    _add_lengths(parser.add_argument_group("how much"))
    _add_sampling(parser.add_argument_group("how tokens are chosen"))
    _add_drafting(parser.add_argument_group("how drafts are made (none of it changes the text, but for 'typical')"))
    _add_output(parser.add_argument_group("what is kept and shown"))
    return parser.parse_args(argv)


def _add_numbers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        help="type that is computed in (default: the model's own, but float32 for bfloat16 on a CPU)",
    )
    group.add_argument(
        "--weights",
        default="stored",
        choices=("stored", "int8"),
        help="stored (default) keeps weights in the type of their files; int8 rounds those of linear layers, head and "
        "table of tokens",
    )
    group.add_argument(
        "--same-bits",
        action="store_true",
        help="add up in one order for any number of drafts and prompts, so that drafts change no token in float32 and "
        "bfloat16 either; somewhat slower",
    )


def _add_lengths(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write at the most (default: 200)"
    )
    group.add_argument(
        "--max-prompt-tokens", type=int, default=2**20, metavar="N", help="longest prompt allowed (default: 1048576)"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before this, which may name special tokens; may be given several times",
    )
    group.add_argument(
        "--batch", type=int, metavar="N", help="prompts decoded at a time; the others wait (default: up to 64)"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens up to P")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P times as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1, avoid tokens that were there"
    )
    group.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")


def _add_drafting(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--drafter",
        help="none, ngram, suffix (which also copies from what this run has written before), copy (from that alone), "
        "medusa, path, model or self, also joined: path+ngram lays them side by side, path/suffix takes the likeliest "
        "of both (default: the model's heads, if any, ngram and copy)",
    )
    group.add_argument(
        "--heads", metavar="DIR", action="append", default=[], help="run folder of draft heads; may be given twice"
    )
    group.add_argument("--draft-model", metavar="DIR", help="folder of a small model with the same tokenizer")
    group.add_argument(
        "--draft-layers", metavar="N,N,...", type=_numbers, help="layers of the model itself that draft for it"
    )
    group.add_argument(
        "--tree",
        default="auto",
        help="auto (whatever turns out to pay while it decodes), none, chain:LENGTH, mc_sim_7b_63, dynamic:SIZE:DEPTH, "
        "or paths such as '0;1;0,0'",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="first search thoroughly for the tree that is fastest on this machine, which takes minutes, and keep it "
        "in the model's folder",
    )
    group.add_argument(
        "--acceptance",
        default="exact",
        help="exact (default: plain decoding's tokens), rejection (drafts are drawn; plain decoding's distribution) or "
        "typical (whatever is likely enough: another text)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save-state", metavar="F", help="read the prompt, write the state after it, and stop there")
    group.add_argument("--state", metavar="F", help="go on from a saved state; the prompt follows what was read")
    group.add_argument("--log-probs", action="store_true", help="with --json: log-probabilities of the tokens")
    group.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="keep no compiled programs on the disk (default: in ~/.cache/lin_jax, or the folder LIN_JAX_CACHE)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' names no layers; give numbers such as 0,2") from None
