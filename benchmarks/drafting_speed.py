"""Plain decoding, chains and trees at several batch sizes, in bfloat16 and with the same bits, by a model made for it.

    python benchmarks/drafting_speed.py [--size 110m] [--batches 1 8 32] [--keep FILE] [--json FILE]

No trained model is needed: one learns this repository's own text for some seconds, a path head is fitted to what it
writes, and prompts are held-out text. So ratios of speeds and costs of steps are real, and how much of a draft stands
is that of such a model: it is told beside them. All ways of a batch take turns, and their programs are compiled at the
same time. Drafted tokens are held against plain decoding's: with the same bits they must be equal; in bfloat16 rows
that differ are looked at, and must part where rounding decides. What is wrong has no speed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from decode_speed import Way, ratio
from flax import nnx
from lib.lossless_subject import fitted, in_type
from lib.quick_model import (
    WordText,
    load_leaves,
    own_documents,
    quick_config,
    save_leaves,
    trained_model,
)
from lib.report import header, write
from lib.tiles_option import add_tiles_option, use_tiles
from tqdm import tqdm
from train_speed import SIZES

from lin_jax.decoding import AnyTree, DraftTree, DynamicTree, Generator, Sampling, parse_tree
from lin_jax.decoding.autotune.costs import measure_costs
from lin_jax.decoding.drafting.drafters import DraftParts, build_drafter
from lin_jax.decoding.equivalence import is_rounding_tie
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.models import LlamaConfig, PathHead
from lin_jax.models.params import abstract_model
from lin_jax.models.stored_weights import WeightStorage
from lin_jax.session import PREFILL_CHUNK, SAME_BITS_CHUNK, draft_parts

# Sixteen nodes: wide where guesses are made with most confidence.
TREE = "0;1;2;3;0,0;0,1;1,0;2,0;0,0,0;0,0,1;0,1,0;1,0,0;0,0,0,0;0,0,0,1;1,0,0,0"
KINDS = ("bfloat16", "same bits")
# Rows that differ in bfloat16 and are looked at, for each way.
LOOKED_AT = 2
# Texts that a head learns from, at least, and how: places in them, all of which are in every step.
WRITTEN, PLACES, HEAD_LEARNING_RATE = 32, 2048, 1e-3


class Pair(NamedTuple):
    """A model and its path head, as training leaves them."""

    model: Any
    head: PathHead


def main() -> int:
    """Trains, measures, prints, and writes JSON if asked to, batch by batch."""
    options = parse()
    use_tiles(options)
    report: dict[str, Any] = header("drafting speed") | {"size": options.size, "correct": True, "cells": []}
    began = time.perf_counter()

    def keep() -> None:
        if options.json not in (None, "-"):
            write(report, options.json)

    text = WordText.of(own_documents(), SIZES[options.size]["vocab_size"])
    pair, report["model"] = model_at_hand(text, options)
    note(f"model and head after {time.perf_counter() - began:.0f} s: {report['model']}")
    keep()
    for kind in options.kinds:
        for cell in cells(pair, kind, text.prompts(max(options.batches), options.prompt), options):
            report["cells"].append(cell)
            report["correct"] &= cell["correct"]
            print(line(cell), flush=True)
            keep()
    report["costs"] = []
    for kind in options.kinds if options.nodes else ():
        report["costs"].append(costs(pair, kind, options))
        print(cost_line(report["costs"][-1]), flush=True)
        keep()
    if options.json == "-":
        write(report, "-")
    return 0 if report["correct"] else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="110m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--trees", nargs="+", default=["chain:4", TREE], metavar="TREE", help="beside plain decoding")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 8, 16, 64], metavar="N", help="whose step is timed")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="that every row writes in each round")
    parser.add_argument("--rounds", type=int, default=4, help="the first is not counted")
    parser.add_argument("--train-seconds", type=float, default=15.0)
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32, help="of a step of training")
    parser.add_argument("--length", type=int, default=512, help="tokens of such a row")
    parser.add_argument("--head-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep model and head, or go on with what is kept")
    add_tiles_option(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    options = parser.parse_args()
    least = {"rounds": 2, "tokens": 8, "prompt": 2, "threads": 1, "rows": 1, "length": 8}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UserError(f"--{name} is {getattr(options, name)}; give {value} or more")
    options.trees = [parse_tree(each) for each in options.trees]
    return options


def model_at_hand(text: WordText, options: argparse.Namespace) -> tuple[Pair, dict[str, Any]]:
    """The model and head that are kept, or new ones."""
    config = quick_config(SIZES[options.size])
    if options.keep and options.keep.exists():
        return kept(config, options.keep), {"kept": str(options.keep)}
    sizes = {"rows": options.rows, "length": options.length}
    model, figures = trained_model(config, text, **sizes, steps=options.train_steps, seconds=options.train_seconds)
    note(f"trained: {figures}")
    model = in_type(model, "bfloat16")
    # What it writes itself is what a head has to guess.
    most = max(options.batches)
    prompts = text.prompts(max(WRITTEN, most), options.prompt)
    plain = generator_of(draft_parts(nnx.clone(model)), None)
    written = plain.generate(prompts, options.tokens, slots=most).tokens
    texts = [[*prompt, *rest] for prompt, rest in zip(prompts, written, strict=True)]
    fit = {"places": PLACES, "steps": options.head_steps, "learning_rate": HEAD_LEARNING_RATE}
    parts = fitted(DraftParts(model), texts, **fit, medusa=False)
    assert parts.path is not None, "it was asked for"
    pair = Pair(model, parts.path)
    if options.keep:
        save_leaves([nnx.state(each) for each in pair], options.keep)
    return pair, figures | {"unknown_words": text.unknown}


def kept(config: LlamaConfig, file: Path) -> Pair:
    """The model and head of a file."""
    sizes = config.hidden_size, max(config.hidden_size // 2, 1), config.vocab_size or 0
    head = nnx.eval_shape(lambda: PathHead(*sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphs, states = zip(*(nnx.split(each) for each in (abstract_model(stored(config)), head)), strict=True)
    return Pair(*map(nnx.merge, graphs, load_leaves(list(states), file)))


def stored(config: LlamaConfig) -> LlamaConfig:
    """The configuration with parameters in bfloat16."""
    return replace(config, param_dtype="bfloat16")


def parts_for(pair: Pair, kind: str) -> DraftParts:
    """Model and head, laid out for decoding."""
    storage = WeightStorage(same_bits=kind == "same bits")
    return draft_parts(nnx.clone(pair.model), [nnx.clone(pair.head)], storage=storage)


def generator_of(parts: DraftParts, tree: AnyTree | None) -> Generator:
    """A generator with a path head and a tree, or without drafts."""
    chunk = SAME_BITS_CHUNK if parts.target.same_bits else PREFILL_CHUNK
    drafter = build_drafter("none" if tree is None else "path", parts)
    return Generator(parts.target, drafter=drafter, tree=tree or DraftTree(), prefill_chunk_size=chunk)


def cells(pair: Pair, kind: str, prompts: list[list[int]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures batch by batch; first, all programs are compiled."""
    parts = parts_for(pair, kind)
    ways = {
        batch: [
            Way(generator_of(parts, tree), "none" if tree is None else "path", None, prompts[:batch], options.tokens)
            for tree in (None, *options.trees)
        ]
        for batch in options.batches
    }
    began = time.perf_counter()
    with ThreadPoolExecutor(options.threads) as pool:
        list(pool.map(Way.decode, [each for some in ways.values() for each in some]))
    note(f"{kind}: compiled after {time.perf_counter() - began:.0f} s")
    for batch, (plain, *drafted) in ways.items():
        for each in (plain, *drafted):
            each.rounds.clear()
        for _ in tqdm(range(options.rounds), desc=f"{kind}, batch {batch}", file=sys.stderr):
            for each in (plain, *drafted):
                each.decode()
        yield told(kind, batch, plain, drafted)


def told(kind: str, batch: int, plain: Way, drafted: list[Way]) -> dict[str, Any]:
    """The figures of a batch; what is wrong has none."""
    cell: dict[str, Any] = {"kind": kind, "batch": batch, "correct": True, "plain": plain.figures(), "drafted": []}
    for each in drafted:
        found = compared(kind, plain, each)
        cell["correct"] &= not found["wrong"]
        if not found["wrong"]:
            found |= {"speedup": ratio(plain, each)} | each.figures()
        cell["drafted"].append(found | {"shape": shape_of(each.generator.tree_for(batch))})
    return cell


def shape_of(tree: AnyTree) -> str:
    """A tree in words."""
    chained = not isinstance(tree, DynamicTree) and tree.size == tree.depth + 1
    return f"{'chain' if chained else 'tree'} of {tree.size - 1}"


def compared(kind: str, plain: Way, drafted: Way) -> dict[str, Any]:
    """Rows of a way that are plain decoding's, and those that are wrong."""
    assert plain.last is not None
    assert drafted.last is not None
    pairs = list(zip(plain.last.tokens, drafted.last.tokens, strict=True))
    differ = [row for row, (one, other) in enumerate(pairs) if one != other]
    wrong = differ
    if kind != "same bits":
        model = plain.generator.model
        looked_at = differ[:LOOKED_AT]
        ties = [is_rounding_tie(model, plain.tails[row], *pairs[row], Sampling(), 0, row) for row in looked_at]
        wrong = [row for row, tie in zip(looked_at, ties, strict=True) if not tie]
    return {"rows": len(pairs), "equal": len(pairs) - len(differ), "wrong": wrong}


def costs(pair: Pair, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step that verifies so many nodes, at the smallest batch."""
    slots = min(options.batches)
    found = measure_costs(
        parts_for(pair, kind).target, slots=slots, sizes=options.nodes, max_cost=float("inf"), steps=16
    )
    return {"kind": kind, "batch": slots, "nodes": list(found.sizes), "seconds": list(found.seconds)}


def line(cell: dict[str, Any]) -> str:
    """A batch in words."""
    said = f"{cell['kind']}, batch {cell['batch']}: plain {cell['plain']['tokens_per_second']:,.0f} tokens/s"
    for each in cell["drafted"]:
        if each["wrong"]:
            said += f"; WRONG in {len(each['wrong'])} of {each['rows']} rows"
            continue
        said += (
            f"; {each['shape']} {each['tokens_per_second']:,.0f} tokens/s, {each['speedup']:.2f} times, "
            f"{each['mean_accepted_tokens']:.2f} tokens a step, {each['equal']} of {each['rows']} rows equal"
        )
    return said


def cost_line(found: dict[str, Any]) -> str:
    """Costs of steps in words."""
    first = found["seconds"][0]
    told = (
        f"{n} nodes {1e3 * s:.3f} ms ({s / first:.2f})" for n, s in zip(found["nodes"], found["seconds"], strict=True)
    )
    return f"{found['kind']}, batch {found['batch']}, a step of {', '.join(told)}"


def note(text: str) -> None:
    """A line on stderr."""
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    exit_cleanly(main)
