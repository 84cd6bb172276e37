"""Speculative output against plain decoding's, token for token: real prompts, every drafter, tree and batch size.

    python benchmarks/lossless.py --json FILE [--model RUN_OR_FOLDER] [--dtype float64|float32|bfloat16] [--same-bits]
        [--prompts N] [--new-tokens N] [--short | --configurations NAME ...] --data FOLDER

Without `--model` it is the pretrained stories260K with augmented attention in groups of 16 on its weights, or with
`--attention`, whose factor, taps, balance and decay are drawn at random so that every branch matters. What plain
decoding says is decoded once, in a batch of 16, and cut on the host where an end token or a stop string demands it;
then every configuration must say the same. The configurations pair each drafter with each tree, and with shapes that
are chosen while decoding ("adaptive"); batch sizes, ways of sampling and endings are laid over them as Latin squares,
so that every pair of values occurs. All of them decode all prompts, but those of batch size 1 a tenth; drafters with a
memory of what was written do so twice, and of two passes that differ the worse is reported. The recurrent states of a
few configurations are compared with plain decoding's after as many tokens, step by step. `--short` takes ten
configurations: most of the time goes into compiling, which `JAX_DISABLE_MOST_OPTIMIZATIONS=1` makes twice as quick.

The status is 1 if a text differs in float64, or in float32 where rounding is not to blame, or a state differs by more
than rounding, or an adaptive configuration accepted no draft: it would show nothing. Such configurations are told that
drafts cost next to nothing, so that shapes are tried and changed all the time, on any machine alike. In bfloat16 the
report says how far texts agree; with `--same-bits` nothing may differ in any type, states included. Medusa and path
heads that a run lacks begin as copies of the model's and are fitted to its plain texts for a moment.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lib.lossless_subject import (
    ADAPTIVE,
    SAME_BITS_MODES,
    SEED,
    SHORT,
    SILENT,
    Configuration,
    Ending,
    Subject,
    configurations,
    prepare,
)
from lib.prompts import by_source
from lib.report import header, write
from tqdm import tqdm

from lin_jax.attention import AttentionConfig, max_draft_depth, parse_name
from lin_jax.attention.state import AugmentedState
from lin_jax.attention.windowed_state import WindowedState
from lin_jax.decoding import Generator, TokenOrigin
from lin_jax.decoding.drafting.drafters import reads_memory
from lin_jax.decoding.drafting.tree import parse_tree
from lin_jax.decoding.equivalence import first_difference, is_rounding_tie, state_difference
from lin_jax.decoding.results import Generation
from lin_jax.errors import UserError, exit_cleanly

# Rounding of sums in another order, as a share of the largest number of a state.
STATE_ROUNDING = {"float64": 1e-9, "float32": 1e-3, "bfloat16": float("inf")}
STATES = ("ngram:dynamic", "model:chain", "self:dynamic", "medusa+ngram:bushy", "suffix:dynamic")


def cut(text: Sequence[int], ending: Ending, pieces: Sequence[bytes]) -> list[int]:
    """A text up to the token that ends it, found without the device."""
    written = b""
    for index, token in enumerate(text):
        written += pieces[token]
        if token in ending.tokens or any(stop.encode() in written for stop in ending.stops):
            return list(text[: index + 1])
    return list(text)


def group_of(attention: AttentionConfig) -> int | None:
    """Tokens of the smallest group, at whose ends states change by more than a token; None where none knows groups."""

    def in_groups(each: AttentionConfig) -> bool:
        return (parse_name(each.name).window and each.window is None) or max_draft_depth(each) is not None

    return min((each.group_size for each in attention.kinds if in_groups(each)), default=None)


def boundaries_crossed(prompt: int, origins: Sequence[int], group: int) -> int:
    """Number of accepted paths that lie across a group boundary.

    Every step commits the token that was newest, and of what it emits all but the last token.
    """
    crossed, begin = 0, 1
    for index in range(1, len(origins)):
        if origins[index] == TokenOrigin.TARGET or index + 1 == len(origins):
            crossed += (prompt + begin - 1) // group != (prompt + index - 1) // group
            begin = index + 1
    return crossed


def compare(chosen: Configuration, subject: Subject, expected: list[list[int]], found: Generation) -> dict[str, Any]:
    """Compares a configuration's texts with plain decoding's."""
    model, sampling = subject.parts.target, subject.modes[chosen.mode]
    differences, agreeing = [], 0
    for row, (one, other) in enumerate(zip(expected, found.tokens, strict=True)):
        index = first_difference(one, other)
        agreeing += len(one) if index is None else index
        if index is not None:
            prompt = subject.prompts[row]
            tie = is_rounding_tie(model, prompt.tokens, one, other, sampling, SEED, row)
            differences.append({"row": row, "source": prompt.source, "token": index, "rounding_tie": tie})
    group = group_of(model.config.attention)
    lengths = [len(prompt.tokens) for prompt in subject.prompts]
    return {
        "prompts": len(expected),
        "tokens": sum(map(len, expected)),
        "equal_prompts": len(expected) - len(differences),
        "share_before_divergence": agreeing / sum(map(len, expected)),
        "divergences": differences,
        "mean_accepted_tokens": found.mean_accepted_tokens,
        "boundaries_crossed": 0
        if group is None
        else sum(boundaries_crossed(*row, group) for row in zip(lengths, found.origins, strict=False)),
        "ended_early": sum(each != "length" for each in found.endings),
        "ended_by_a_draft": sum(
            each != "length" and row[-1] == TokenOrigin.DRAFT
            for each, row in zip(found.endings, found.origins, strict=True)
        ),
        "tokens_per_second": found.tokens_per_second,
    }


def try_one(chosen: Configuration, subject: Subject) -> dict[str, Any]:
    """Decodes in one configuration, and compares."""
    count = len(subject.prompts) if chosen.batch > 1 else max(len(subject.prompts) // 10, 4)
    ending = subject.endings[chosen.mode][chosen.ending]
    texts = [prompt.tokens for prompt in subject.prompts[:count]]
    began = time.perf_counter()
    generator = subject.generator(chosen.drafter, chosen.tree, ending)
    sampling = subject.modes[chosen.mode]
    passes = [
        generator.generate(texts, subject.new_tokens, sampling=sampling, seed=SEED, slots=chosen.batch)
        for _ in range(2 if reads_memory(chosen.drafter) else 1)
    ]
    seconds = time.perf_counter() - began
    expected = [cut(text, ending, subject.pieces) for text in subject.plain[chosen.mode][:count]]
    compared = [compare(chosen, subject, expected, found) for found in passes]
    worst = min(compared, key=lambda each: each["share_before_divergence"])
    accepted = [each["mean_accepted_tokens"] for each in compared]
    steps: Counter[str] = Counter()
    for found in passes:
        for tree, taken in found.steps_by_tree.items():
            steps[str(parse_tree(tree).size)] += taken
    told = {"accepted_tokens_by_pass": accepted, "steps_by_nodes": dict(steps), "seconds": seconds}
    return {**chosen._asdict(), **worst, **told}


def without_drafts(results: Sequence[dict[str, Any]]) -> list[str]:
    """Configurations that were to choose among shapes and accepted no draft: they show nothing."""
    fields = Configuration._fields
    return [
        Configuration(*(each[name] for name in fields)).name
        for each in results
        if each["tree"] == ADAPTIVE and each["drafter"] != SILENT and max(each["accepted_tokens_by_pass"]) <= 1
    ]


class Record(NamedTuple):
    """Batch between two steps, on the host: number of tokens of each row, the tokens, and the recurrent state."""

    written: np.ndarray
    output: np.ndarray
    state: Any


def records(generator: Generator, subject: Subject, mode: str) -> list[Record]:
    """The first prompts as they are decoded, before the first step and after every one."""
    texts = [prompt.tokens for prompt in subject.prompts[:16]]
    scheduler = generator.stream(texts, subject.new_tokens, sampling=subject.modes[mode], seed=SEED, slots=len(texts))
    found = []
    while True:
        state = scheduler.state
        # Copies: the next step takes the buffers.
        found.append(jax.tree.map(np.array, Record(state.written, state.output, state.decode_state.model)))
        if bool(state.finished.all()):
            return found
        scheduler.advance(1)


def compare_states(chosen: Configuration, subject: Subject) -> dict[str, Any]:
    """Compares states with plain decoding's after the same tokens, step by step, without early endings."""
    plain = records(Generator(subject.parts.target, prefill_chunk_size=subject.piece), subject, chosen.mode)
    texts, largest, compared = plain[-1].output, 0.0, 0
    for record in records(subject.generator(chosen.drafter, chosen.tree), subject, chosen.mode):
        # A state holds all tokens but the newest; where texts have parted (never in float64), so have states.
        consumed = record.written - 1
        alike = [row for row, n in enumerate(consumed) if np.array_equal(record.output[row, :n], texts[row, :n])]
        if not alike:
            continue
        # Plain decoding has consumed n new tokens after n steps.
        parts = [jax.tree.map(lambda leaf, r=row: leaf[:, r], plain[consumed[row]].state) for row in alike]
        same = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *parts)
        ours = jax.tree.map(lambda leaf, rows=alike: leaf[:, rows], record.state)
        largest = max(largest, state_difference(ours, same))
        compared += len(alike)
    names = {"drafter": chosen.drafter, "tree": chosen.tree, "mode": chosen.mode}
    return {**names, "states": compared, "largest_difference": largest}


def pairs(results: Sequence[Configuration]) -> dict[str, str]:
    """Number of pairs of values that occur, of those that are possible, for every two of a configuration's fields."""
    found = {}
    for first, second in combinations(Configuration._fields, 2):
        seen = {(getattr(each, first), getattr(each, second)) for each in results}
        possible = {(getattr(each, first), getattr(each, second)) for each in configurations()}
        every = len({one for one, _ in possible}) * len({other for _, other in possible})
        found[f"{first} x {second}"] = f"{len(seen)} of {every}"
    return found


def failed(report: dict[str, Any]) -> bool:
    """True if something differs that must not, or a configuration shows nothing."""
    dtype = report["dtype"]
    divergences = [each for result in report["results"] for each in result["divergences"]]
    exact = report["same_bits"]
    if dtype == "bfloat16" and not exact:
        divergences = []
    elif dtype == "float32" and not exact:
        divergences = [each for each in divergences if not each["rounding_tie"]]
    most = 0.0 if exact else STATE_ROUNDING[dtype]
    if any(each["largest_difference"] > most for each in report["state_equality"]):
        return True
    return bool(divergences) or bool(report["adaptive_without_drafts"])


def accepted_shown(result: dict[str, Any]) -> str:
    """Mean accepted tokens, pass by pass."""
    return " ".join(f"{each:.2f}" for each in result["accepted_tokens_by_pass"])


def show(report: dict[str, Any]) -> None:
    """The results as a table."""
    print(f"{'drafter':13}{'tree':13}{'batch':>6} {'mode':10}{'ending':12}", end="")
    print(f"{'equal':>9}{'tokens':>8}{'agree':>8}{'ties':>6}{'accepted':>11}{'crossed':>8}{'in run':>7}{'tok/s':>7}")
    for each in report["results"]:
        ties = sum(one["rounding_tie"] for one in each["divergences"])
        print(
            f"{each['drafter']:13}{each['tree']:13}{each['batch']:6} {each['mode']:10}{each['ending']:12}"
            f"{each['equal_prompts']:>4}/{each['prompts']:<4}{each['tokens']:>8,}{each['share_before_divergence']:>8.2%}"
            f"{ties:>6}{accepted_shown(each):>11}{each['boundaries_crossed']:>8,}{each['ended_by_a_draft']:>7}"
            f"{each['tokens_per_second']:>7,.0f}"
        )
    for each in report["state_equality"]:
        difference = each["largest_difference"]
        equal = "to the bit" if difference == 0 else f"within {difference:.1e}"
        print(f"{each['states']:,} states of {each['drafter']}, {each['tree']}, {each['mode']}: equal {equal}")
    for name in report["adaptive_without_drafts"]:
        print(f"{name} accepted no draft, and shows nothing")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="write the report to a file, or with - print it")
    parser.add_argument("--model", metavar="FOLDER", help="a run or Hugging Face folder; default: stories260K")
    parser.add_argument(
        "--attention",
        default="augmented",
        metavar="NAME",
        help="of stories260K, with options behind it, such as exponential+window/window=16/decay=token, or five with "
        "commas, one a layer",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of prompts: see lib/prompts.py")
    parser.add_argument("--dtype", choices=STATE_ROUNDING, default="float64")
    parser.add_argument(
        "--same-bits",
        action="store_true",
        help="sum in one order for any number of nodes and rows: no text may differ in any type; greedy and sampled",
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="how many; default: 564")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", action="store_true", help="ten configurations, with every kind of drafter")
    which.add_argument(
        "--configurations",
        nargs="+",
        metavar="NAME",
        help="those whose DRAFTER:TREE:BATCH:MODE:ENDING begins so",
    )
    return parser.parse_args()


def main() -> int:
    """Measures, prints and writes; 1 if something differs that must not, or a configuration shows nothing."""
    options = parse()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    wanted = SHORT if options.short else options.configurations or [""]
    chosen = [each for each in configurations() if each.name.startswith(tuple(wanted))]
    if options.same_bits:
        chosen = [each for each in chosen if each.mode in SAME_BITS_MODES]
    if not chosen:
        raise UserError(f"no configuration begins with {' or '.join(wanted)}; try ngram, or {configurations()[0].name}")
    subject = prepare(options, chosen)
    results = []
    with tqdm(chosen, unit="configuration", disable=None) as bar:
        for each in bar:
            if results and results[-1]["drafter"] != each.drafter:
                jax.clear_caches()
            results.append(try_one(each, subject))
            if options.json != "-":
                write({**describe(options, subject), "results": results}, options.json)
            bar.set_postfix_str(f"{each.name}: {results[-1]['tokens_per_second']:,.0f} tokens/s")
    report = {**describe(options, subject), "pairs": pairs(chosen), "results": results}
    report["state_equality"] = state_equality(subject, chosen)
    report["adaptive_without_drafts"] = without_drafts(results)
    report["lossless"] = not failed(report)
    show(report)
    write(report, options.json)
    return int(not report["lossless"])


def describe(options: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Model, prompts and endings, for the report."""
    lengths = [len(prompt.tokens) for prompt in subject.prompts]
    config = subject.parts.target.config
    return {
        **header("lossless"),
        "model": options.model or "stories260K",
        "attention": config.attention.label if options.model else options.attention,
        "group_size": group_of(config.attention),
        "compiled_as_for_users": not jax.config.values["jax_disable_most_optimizations"],
        "dtype": options.dtype,
        "same_bits": options.same_bits,
        "prompts": by_source(subject.prompts),
        "prompt_tokens": {"shortest": min(lengths), "mean": sum(lengths) / len(lengths), "longest": max(lengths)},
        "new_tokens": options.new_tokens,
        "endings": {
            mode: {name: [*each.tokens, *each.stops] for name, each in found.items()}
            for mode, found in subject.endings.items()
        },
    }


def state_equality(subject: Subject, chosen: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The states of a few of the chosen configurations, if the attention's state has a constant size."""
    state = jax.eval_shape(lambda: subject.parts.target.init_state(1, 1))
    if not isinstance(state, AugmentedState | WindowedState):
        return []
    return [compare_states(each, subject) for each in chosen if f"{each.drafter}:{each.tree}" in STATES]


if __name__ == "__main__":
    exit_cleanly(main)
