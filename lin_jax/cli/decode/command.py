"""Decodes prompts from a terminal."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from lin_jax.cli.decode.prompts import given_prompts
from lin_jax.cli.json_line import json_line
from lin_jax.data.tokenizers.tokenizer import whole_characters
from lin_jax.decoding.acceptance.rules import ACCEPTANCE_RULES
from lin_jax.decoding.drafting.tree import DraftTree, chain, parse_tree
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.decoding.engine.sampling import Sampling
from lin_jax.decoding.engine.slots import bucket
from lin_jax.decoding.engine.stop_strings import check_stops
from lin_jax.decoding.generator import MAX_SLOTS, Generator, check_batch, check_new_tokens
from lin_jax.decoding.results import Generation
from lin_jax.decoding.scheduler import Scheduler
from lin_jax.decoding.streamed_text import StreamedText
from lin_jax.devices import devices_shown
from lin_jax.errors import UserError, check_seed
from lin_jax.progress_bar import progress_bar
from lin_jax.session import Session, check_length

# What a shell expects of a program that Ctrl-C ended.
INTERRUPTED = 130
# Guesses of a chain where the acceptance rule needs a tree that stays and none is named.
FIXED_LENGTH = 3
# Waits that need no explanation; and tokens of a prompt whose reading may take longer.
_UNNOTICED_SECONDS, _LONG_PROMPT = 1.0, 4096


def decode(options: argparse.Namespace) -> int:
    """Writes the continuation of every prompt to stdout, and figures to stderr; returns the exit status."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    _check(options)
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    texts = _whole(given_prompts(options.prompt, options.prompt_file))
    devices = devices_shown()
    session = Session.load(
        options.model,
        options.heads,
        draft_model=options.draft_model,
        draft_layers=options.draft_layers,
        step=options.step,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        weights=options.weights,
        same_bits=options.same_bits,
    )
    _note(f"decoding on {devices}")
    prompts = [session.encode_prompt(text, begins=not options.state) for text in texts]
    # Whatever can be wrong is found out before anything is measured for the plan.
    check_length(prompts, options.max_prompt_tokens)
    if options.save_state and len(prompts) != 1:
        raise UserError(f"--save-state is for one prompt, and there are {len(prompts)}; give one")
    slots = options.batch or min(bucket(len(texts)), MAX_SLOTS)
    check_new_tokens(options.max_new_tokens, slots)
    kind, generator = _generator(session, options, slots)
    if (longest := max(map(len, prompts), default=0)) >= _LONG_PROMPT:
        _note(f"reading a prompt of {longest:,} tokens")
    if options.save_state:
        return _save_state(generator, prompts[0], options, sampling, slots)
    prefix = None
    if options.state:
        prefix = generator.load_prefix(options.state, sampling=sampling, slots=slots)
    scheduler = generator.stream(
        prompts,
        options.max_new_tokens,
        sampling=sampling,
        seed=options.seed,
        slots=slots,
        prefix=prefix,
        log_probs=options.log_probs,
        steps_per_sync=8 if len(prompts) == 1 else 32,
    )
    write = _print_stream if len(prompts) == 1 and not options.json else _print_all
    status = write(session, texts, scheduler, options)
    _note(_figures(scheduler.generation, kind))
    session.save_costs()
    _finish_compiling(generator.compiler, status)
    return status


def _finish_compiling(compiler: ProgramCompiler, status: int) -> None:
    """Waits for a program that is being compiled, and says so; Ctrl-C ends the process, which Python would not."""
    try:
        if not compiler.wait(_UNNOTICED_SECONDS):
            _note("one more program is being compiled, which the next call has at once; Ctrl-C leaves it")
            compiler.wait()
    except KeyboardInterrupt:
        os._exit(status)


def _check(options: argparse.Namespace) -> None:
    """Refuses wrong values before a model is read.

    Raises:
        UserError: there is one.
    """
    if options.acceptance not in ACCEPTANCE_RULES:
        raise UserError(f"acceptance '{options.acceptance}' is unknown; choose one of {', '.join(ACCEPTANCE_RULES)}")
    if options.batch is not None:
        check_batch(options.batch, "--batch")
    check_seed(options.seed, "--seed")
    check_new_tokens(options.max_new_tokens)
    check_stops(options.stop)
    if options.tree != "auto":
        parse_tree(options.tree)
    if options.state and not Path(options.state).is_file():
        raise UserError(f"cannot read a state from {options.state}: there is no such file; save one with --save-state")


def _whole(texts: Sequence[str]) -> list[str]:
    """The prompts without halves of characters; says how many had any."""
    whole = [whole_characters(text) for text in texts]
    if mended := sum(one != other for one, other in zip(texts, whole, strict=True)):
        _note(f"{mended} of {len(texts)} prompts had half a character (a surrogate on its own), now U+FFFD")
    return whole


def _generator(session: Session, options: argparse.Namespace, slots: int) -> tuple[str, Generator]:
    """Builds what decodes, by the drafter and tree asked for, or those that turn out to pay; names the drafter too."""
    if options.plan:
        _note(session.plan(options.drafter, slots, _note, shown=True).summary)
    if options.tree == "auto" and options.acceptance == "exact" and options.drafter != "none":
        kind, _ = session.adaptive_drafter(options.drafter, slots)
        return kind, session.adaptive_generator(options.drafter, slots, stops=options.stop)
    kind = options.drafter or ("path" if session.parts.path is not None else "ngram")
    automatic = DraftTree() if kind == "none" else chain(FIXED_LENGTH)
    tree = automatic if options.tree == "auto" else parse_tree(options.tree)
    return kind, session.generator(kind, tree, stops=options.stop, acceptance=options.acceptance)


def _save_state(
    generator: Generator,
    prompt: Sequence[int],
    options: argparse.Namespace,
    sampling: Sampling,
    slots: int,
) -> int:
    prefix = generator.prefix(prompt, sampling=sampling, slots=slots, room=options.max_new_tokens)
    prefix.save(options.save_state)
    size = Path(options.save_state).stat().st_size
    _note(f"read {prefix.length:,} tokens; the state after them is in {options.save_state} ({size / 1024:,.0f} KiB)")
    return 0


def _print_stream(session: Session, texts: Sequence[str], scheduler: Scheduler, options: argparse.Namespace) -> int:
    """Prints one continuation as it comes."""
    text, status = StreamedText(session.tokenizer, options.stop, scheduler.tokens_before(0)), 0
    sys.stdout.write(texts[0])
    try:
        for update in scheduler:
            sys.stdout.write(text.push(update.tokens))
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        sys.stdout.write(text.flush() + "\n")
        sys.stdout.flush()
    return status


def _print_all(session: Session, texts: Sequence[str], scheduler: Scheduler, options: argparse.Namespace) -> int:
    """Shows how far it is, and prints every continuation at the end."""
    status = 0
    with progress_bar(total=len(texts), unit="prompt", shown=len(texts) > 1) as progress:
        try:
            for update in scheduler:
                progress.update(update.finished)
                progress.set_postfix_str(f"{scheduler.tokens_per_second:,.0f} tokens/s", refresh=False)
        except KeyboardInterrupt:
            status = INTERRUPTED
    generation = scheduler.generation
    for row, text in enumerate(texts):
        tokens = generation.tokens[row]
        continuation = session.decode(tokens, options.stop, scheduler.tokens_before(row))
        if not options.json:
            print(f"{text}{continuation}\n---")
            continue
        found = {"prompt": text, "text": continuation, "tokens": tokens, "ending": generation.endings[row]}
        if generation.log_probs is not None:
            found["log_probs"] = generation.log_probs[row]
        print(json_line(found))
    return status


def _figures(generation: Generation, kind: str) -> str:
    return (
        f"{sum(map(len, generation.tokens))} tokens, {generation.tokens_per_second:,.0f} tokens/s, "
        f"{generation.mean_accepted_tokens:.2f} tokens per step ({_drafted(generation, kind)}), "
        f"ready after {generation.prefill_seconds:.2f} s, state {generation.state_bytes / 1024:,.0f} KiB"
    )


def _drafted(generation: Generation, kind: str) -> str:
    """Steps with drafts, in words; without any it is plain decoding, whatever might have been drafted."""
    steps = {tree: count for tree, count in generation.steps_by_tree.items() if count}
    drafted = {parse_tree(tree).size: count for tree, count in steps.items() if tree != "none"}
    if not drafted:
        return "plain decoding"
    sizes = ", ".join(f"{count:,} of {size} nodes" for size, count in sorted(drafted.items()))
    return f"drafter {kind}: {sizes}, {steps.get('none', 0):,} plain steps"


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
