"""Command `self-generate`: texts that a model writes itself, to train its draft heads on.

Heads that guess for a model do better on what the model says than on what people wrote. Every text goes on from the
beginning of a training document of the run, and is cut where it goes round in circles: there is nothing to learn there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lin_jax.data import open_documents, split_documents
from lin_jax.decoding.engine.sampling import Sampling
from lin_jax.decoding.generator import Generator, check_batch
from lin_jax.devices import devices_shown
from lin_jax.errors import OptionParser, UserError, check_seed
from lin_jax.files import replacement
from lin_jax.progress_bar import progress_bar
from lin_jax.session import Session

FIELD = "text"
# What counts as going round in circles: so many tokens that repeat with a period of so many at the most.
CIRCLE, PERIOD = 32, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the texts; the file is complete or not there.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(argv)
    output = Path(options.output)
    if not output.parent.is_dir():
        # Found out before hours of writing, not behind them.
        raise UserError(f"cannot write {output}: there is no folder {output.parent}; make it, or give another file")
    devices = devices_shown()
    session = Session.load(options.model)
    print(f"generating on {devices}", file=sys.stderr)
    prompts = _prompts(session, options)
    generator = Generator(session.model, end_tokens=session.end_tokens)
    sampling = Sampling(options.temperature)
    scheduler = generator.stream(
        prompts, options.new_tokens, sampling=sampling, seed=options.seed, slots=options.batch, steps_per_sync=32
    )
    with progress_bar(total=len(prompts), unit="text") as progress:
        for update in scheduler:
            progress.update(update.finished)
            progress.set_postfix_str(f"{scheduler.tokens_per_second:,.0f} tokens/s", refresh=False)
    continuations = [before_circles(tokens) for tokens in scheduler.generation.tokens]
    try:
        with replacement(output) as partial, partial.open("w", encoding="utf-8") as file:
            for prompt, tokens in zip(prompts, continuations, strict=True):
                text = session.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
                file.write(json.dumps({FIELD: text}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; give another file") from error
    written = sum(map(len, continuations))
    print(f"{len(prompts):,} texts, {written:,} tokens of the model's own: {output}; train heads with --data.source")
    return 0


def before_circles(tokens: Sequence[int]) -> list[int]:
    """Cuts tokens where `CIRCLE` of them repeat what came at most `PERIOD` before."""
    text, found = np.asarray(tokens, np.int64), len(tokens)
    for period in range(1, min(PERIOD, len(tokens) - CIRCLE) + 1):
        same = np.convolve(text[period:] == text[:-period], np.ones(CIRCLE, int), "valid")
        found = min([found, *(np.flatnonzero(same == CIRCLE)[:1] + period).tolist()])
    return list(tokens[:found])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m lin_jax self-generate",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument("output", metavar="OUT.jsonl", help=f"a line a text, in the field '{FIELD}'")
    parser.add_argument("--texts", type=int, default=1024, metavar="N", help="how many texts")
    parser.add_argument("--prompt-tokens", type=int, default=24, metavar="N", help="tokens of a document to go on from")
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N", help="tokens to write at the most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, which is what heads guess best")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="texts written at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents and of sampling")
    return parser.parse_args(argv)


def _prompts(session: Session, options: argparse.Namespace) -> list[list[int]]:
    """Pieces of the run's training documents, from places chosen at random."""
    check_seed(options.seed, "--seed")
    check_batch(options.batch, "--batch")
    if options.texts < 1 or options.prompt_tokens < 1:
        raise UserError(f"--texts is {options.texts}, --prompt-tokens {options.prompt_tokens}; give at least 1 of each")
    if session.data is None:
        raise UserError(f"{options.model} is no run, and so has no text to go on from; give a run folder")
    config = session.data
    documents, _ = split_documents(open_documents(config), config.validation_fraction)
    rng = np.random.default_rng(options.seed)
    encoded: dict[int, np.ndarray] = {}
    lengths = np.array([len(document.text) for document in documents], float)
    prompts = []
    for number in rng.choice(len(documents), size=options.texts, p=lengths / lengths.sum()):
        if number not in encoded:
            encoded[number] = session.tokenizer.encode(documents[number].text)
        tokens = encoded[number]
        # Half of the texts begin where a document does.
        last = max(len(tokens) - options.prompt_tokens, 0)
        begin = int(rng.integers(0, last + 1)) if rng.random() < 0.5 else 0
        piece = tokens[begin : begin + options.prompt_tokens].tolist()
        first = session.tokenizer.begin_ids if begin == 0 else ()
        prompts.append([*first, *piece])
    return [prompt for prompt in prompts if prompt]
