"""The command line of decode.py."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from lin_jax.decoding.drafters import KINDS
from lin_jax.errors import UserError

# Help and wrong options should not wait for the checkpoint and tokenizer libraries: they come when they are needed.
if TYPE_CHECKING:
    from lin_jax.data import Tokenizer
    from lin_jax.decoding.generator import Generation


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; 'decode.py --help' lists every option")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        UserError: an option is unknown or has a wrong value.
        SystemExit: help was asked for.
    """
    parser = _Parser(
        prog="decode.py",
        description="Goes on from a prompt with a trained model, plainly or with lossless speculation: the text is "
        "the same, only the time differs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder that train.py wrote, or Hugging Face folder")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="text to go on from")
    text.add_argument("--prompt-file", metavar="F", help="file with the prompt, or .jsonl with a field 'prompt'")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write at the most")
    parser.add_argument("--max-prompt-tokens", type=int, default=131072, metavar="N", help="longest prompt allowed")
    parser.add_argument(
        "--drafter", default=None, choices=KINDS, help="where guesses come from (default: all there are)"
    )
    parser.add_argument("--heads", metavar="DIR", help="folder of Medusa heads (default: those inside MODEL)")
    parser.add_argument(
        "--tree",
        default="auto",
        help="draft tree: auto (measured for this machine), chain:LENGTH, mc_sim_7b_63, or paths such as '0;1;0,0'",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens up to P")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, with the figures")
    return parser.parse_args(argv)


def decode(options: argparse.Namespace) -> int:
    """Writes the continuation of every prompt to the terminal, and the figures to stderr."""
    from lin_jax.decoding.generator import Generation
    from lin_jax.decoding.sampling import Sampling
    from lin_jax.decoding.session import Session, check_length, read_prompts
    from lin_jax.decoding.tree import parse_tree

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    texts = [options.prompt] if options.prompt_file is None else read_prompts(options.prompt_file)
    session = Session.load(options.model, options.heads)
    prompts = [session.encode_prompt(text) for text in texts]
    check_length(prompts, options.max_prompt_tokens)
    kind = options.drafter or ("ngram" if session.heads is None else "medusa+ngram")
    tree = session.plan(kind, _note).tree if options.tree == "auto" else parse_tree(options.tree)
    generator = session.generator(kind, tree)

    def report(generation: Generation) -> None:
        _note(
            f"{generation.decoded + len(prompts)} tokens, {generation.tokens_per_second:,.0f} tokens/s, "
            f"{generation.mean_accepted_tokens:.2f} tokens per step (drafter {kind}, {tree.size} nodes), "
            f"ready after {generation.prefill_seconds:.2f} s, state {generation.state_bytes / 1024:,.0f} KiB"
        )

    if len(prompts) == 1 and not options.json:
        parts = generator.stream(prompts[0], options.max_new_tokens, sampling=sampling, seed=options.seed)
        report(_print_stream(texts[0], session.tokenizer, parts))
        return 0
    generation = generator.generate(prompts, options.max_new_tokens, sampling=sampling, seed=options.seed)
    for text, tokens in zip(texts, generation.tokens, strict=True):
        continuation = session.tokenizer.decode(tokens, skip_special_tokens=True)
        if options.json:
            print(json.dumps({"prompt": text, "text": continuation, "tokens": tokens}))
        else:
            print(f"{text}{continuation}\n---")
    report(generation)
    return 0


def _print_stream(text: str, tokenizer: "Tokenizer", parts: "Iterator[Generation]") -> "Generation":
    """Prints a continuation as it comes; returns the figures of all its parts together."""
    from lin_jax.data import StreamDecoder
    from lin_jax.decoding.generator import joined

    decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
    seen = []
    sys.stdout.write(text)
    try:
        for part in parts:
            seen.append(part)
            sys.stdout.write(decoder.push(part.tokens[0]))
            sys.stdout.flush()
    finally:
        sys.stdout.write(decoder.flush() + "\n")
        sys.stdout.flush()
    return joined(seen)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
