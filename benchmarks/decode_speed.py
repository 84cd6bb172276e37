"""Tokens per second over batch and context, plain and with drafts, and the cost of a token after a text of any length.

    python benchmarks/decode_speed.py [--model RUN] [--batches 1 4 16 64] [--contexts 128 4096 32768] [--json FILE]
    python benchmarks/decode_speed.py --long 1000 1000000 --json      # two contexts, read in bounded memory

Every cell of batch and context is timed in turn, round after round, and medians are taken. A long context is read once
and every row goes on from it with a few tokens of its own. Drafts are those of Session.plan for the batch, if the run
has heads or a drafter is named; their tokens must be those of plain decoding, which at the shortest context are checked
against a forward pass over the whole text. A wrong cell has no speed. Cells for which the time does not suffice are
left out and named.
"""

import argparse
import resource
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lib.plots import plot_speed
from lib.prompts import read_texts
from lib.report import header, write
from tqdm import tqdm

from lin_jax.attention import AttentionConfig
from lin_jax.data import read_documents, split_documents
from lin_jax.decoding import Generation, Generator, Prefix, Sampling, parse_tree
from lin_jax.decoding.drafting.drafters import DraftParts, build_drafter
from lin_jax.decoding.drafting.tree import AnyTree, tree_text
from lin_jax.decoding.engine.prefill import init_decode_state, prefill
from lin_jax.decoding.engine.programs import Flat
from lin_jax.decoding.equivalence import ROUNDING, is_rounding_tie
from lin_jax.errors import UserError, exit_cleanly
from lin_jax.models import CausalModel, Llama, LlamaConfig
from lin_jax.session import Session
from lin_jax.training.config import CONFIG_FILE
from lin_jax.training.config_file import load_run_config

PIECE = 512
# What a prompt ends with that is a row's own.
TAIL = 32
# A long text is read so many tokens at a time between two looks at the clock.
STRIDE = 32 * PIECE
BYTES = {"darwin": 1}.get(sys.platform, 1024)


@dataclass
class Subject:
    """Model, texts, and the prefixes read of them.

    Attributes:
        session: the run; None is a model with random weights.
        model: the model.
        text: token ids that prompts are cut from, again and again.
        read: prefixes by length and drafter.
    """

    session: Session | None
    model: CausalModel
    text: "array[int]"
    read: dict[tuple[int, str], Prefix] = field(default_factory=dict)

    def cut(self, begin: int, length: int) -> "array[int]":
        """Tokens from a place of the text on."""
        begin %= len(self.text)
        return (self.text[begin:] + self.text * (length // len(self.text) + 1))[:length]

    def prompt(self, context: int, rows: int) -> tuple["array[int]", list[list[int]]]:
        """Common beginning of all rows, and the end of each: `context` tokens together."""
        tail = min(TAIL, max(context // 2, 1))
        own = [self.cut(context - tail + 7 * row * tail, tail).tolist() for row in range(rows)]
        return self.cut(0, context - tail), own

    def prefix(self, generator: Generator, kind: str, context: int, batch: int, room: int) -> Prefix:
        """Prefix of the common beginning of all rows, read once for each drafter."""
        if (context, kind) not in self.read:
            prefix = generator.prefix(self.prompt(context, 1)[0], slots=batch, room=room)
            jax.block_until_ready(prefix.decode_state)
            self.read[context, kind] = prefix
        return self.read[context, kind]


@dataclass
class Way:
    """One way to decode one cell: a generator, where it goes on from, what it wrote, and its seconds round by round.

    Without a prefix the tails are whole prompts.
    """

    generator: Generator
    drafter: str
    prefix: Prefix | None
    tails: list[list[int]]
    tokens: int
    last: Generation | None = None
    rounds: list[float] = field(default_factory=list)

    def decode(self) -> Generation:
        """Decodes and takes the time."""
        self.last = self.generator.generate(self.tails, self.tokens, prefix=self.prefix, slots=len(self.tails))
        self.rounds.append(self.last.decode_seconds)
        return self.last

    def figures(self) -> dict[str, Any]:
        """Medians over the rounds but the first, and how the tokens came about."""
        assert self.last is not None
        seconds = float(np.median(self.rounds[1:]))
        tree = self.generator.tree_for(len(self.tails))
        steps = self.last.nodes / (len(self.tails) * tree.size)
        return {
            "drafter": self.drafter,
            "tree": tree_text(tree),
            "tokens_per_second": self.last.decoded / seconds,
            "milliseconds_per_token": 1e3 * seconds * len(self.tails) / self.last.decoded,
            "milliseconds_per_step": 1e3 * seconds / steps,
            "mean_accepted_tokens": self.last.mean_accepted_tokens,
            "acceptance_by_depth": self.last.acceptance_by_depth,
            "useful_tokens": self.last.decoded,
            "computed_tokens": self.last.nodes,
            "useful_share": self.last.useful_share,
        }


@dataclass
class Cell:
    """One batch and one context.

    Attributes:
        batch: rows.
        context: tokens of every row's prompt.
        plain: without drafts.
        drafted: with drafts; None if there are none, or the plan is to have none.
        ties: rows that differ at a token whose two candidates are equal within rounding.
        correct: whether the tokens are right.
        peak: the process's peak memory so far.
    """

    batch: int
    context: int
    plain: Way
    drafted: Way | None
    ties: int = 0
    correct: bool = True
    peak: int = 0

    @property
    def ways(self) -> list[Way]:
        """Ways that take turns."""
        return [self.plain] if self.drafted is None else [self.plain, self.drafted]

    def check(self, subject: Subject, whole: bool) -> None:
        """Compares drafted with plain tokens, and, if asked to, plain tokens with a forward pass."""
        plain = self.plain.decode().tokens
        common = subject.prompt(self.context, 1)[0].tolist()
        if self.drafted is not None:
            for row, (one, other) in enumerate(zip(plain, self.drafted.decode().tokens, strict=True)):
                prompt = common + self.plain.tails[row]
                same = one == other
                tie = not same and is_rounding_tie(subject.model, prompt, one, other, Sampling(), 0, row)
                self.ties += tie
                self.correct = self.correct and (same or tie)
        if whole:
            self.correct = self.correct and agrees(subject.model, common + self.plain.tails[0], plain[0])
        self.peak = peak_memory()

    def result(self) -> dict[str, Any]:
        """The cell's part of the report."""
        plain, drafted = (way.figures() if way and self.correct else None for way in (self.plain, self.drafted))
        assert self.plain.last is not None
        return {
            "batch": self.batch,
            "context": self.context,
            "correct": self.correct,
            "rounding_ties": self.ties,
            "plain": plain,
            "speculative": drafted,
            "speedup": ratio(self.plain, self.drafted) if drafted and self.drafted else None,
            "state_bytes": self.plain.last.state_bytes,
            "peak_memory_bytes": self.peak,
        }


def main() -> int:
    """Measures, prints, and writes JSON and a plot if asked to."""
    options = parse()
    subject = load(options)
    cells, extra = far_apart(subject, options) if options.long else table(subject, options)
    measure(cells, options.rounds)
    first = cells[0]
    results = [cell.result() for cell in cells]
    for cell, result in zip(cells, results, strict=True):
        shortest = next(each for each in cells if each.batch == cell.batch)
        result["ratio"] = per_token(shortest, cell) if cell.correct and shortest.correct else None
        print(line(result))
    alone = [result["ratio"] for result in results if result["batch"] == first.batch]
    report = header("decode_speed") | {
        "model": options.model,
        "attention": subject.model.config.attention.name,
        "dtype": subject.model.config.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(subject.model, nnx.Param))),
        "rounds": options.rounds,
        "tokens_per_round": options.tokens,
        "correct": all(cell.correct for cell in cells),
        "results": results,
        "largest_ratio": max((ratio for ratio in alone if ratio), default=None),
        **extra,
    }
    if options.json is not None:
        write(report, options.json)
    if options.plot is not None:
        plot_speed(report, options.plot)
    return 0 if report["correct"] else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or print it")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (PNG)")
    parser.add_argument("--model", metavar="RUN", help="run or Hugging Face folder; default: random, the demo's size")
    parser.add_argument("--attention", default="augmented", help="token mixer, where no folder is given")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="texts for a Hugging Face folder")
    parser.add_argument("--drafter", metavar="KIND", help="default: the plan's, if the run has heads; none: no drafts")
    parser.add_argument("--tree", help="default: the plan's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096, 32768], metavar="N")
    parser.add_argument("--long", type=int, nargs=2, metavar="N", help="two contexts far apart instead, at batch 1")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that every row writes in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit-seconds", type=float, default=300, help="for all cells together, without planning")
    options = parser.parse_args()
    if options.tree and options.drafter in (None, "none"):
        raise UserError(f"--tree {options.tree} needs a drafter; name one with --drafter")
    shortest = min(options.long or options.contexts)
    if shortest < 2 or min(options.batches) < 1 or options.tokens < 2 or options.rounds < 1:
        raise UserError("contexts and --tokens must be 2 or more, batches and --rounds 1 or more")
    return options


def load(options: argparse.Namespace) -> Subject:
    """The model of a run, or one with random weights: they make no difference to the speed of plain decoding."""
    if options.model:
        session = Session.load(options.model)
        return Subject(session, session.model, array("i", real_text(session, options.data)))
    attention = AttentionConfig(options.attention, 64, 31, initial_alpha=0.1)
    model = Llama(LlamaConfig(vocab_size=2048, num_heads=4, attention=attention), rngs=nnx.Rngs(0))
    return Subject(None, model, array("i", np.random.default_rng(0).integers(0, 2048, 1 << 16).tolist()))


def real_text(session: Session, data: Path | None) -> Iterator[int]:
    """The documents that a run held out, one after the other; other models get those of the data folder."""
    if (session.folder / CONFIG_FILE).exists():
        config = load_run_config(session.folder).data
        texts = [each.text for each in split_documents(read_documents(config), config.validation_fraction)[1]]
    else:
        texts = [text for _, text in read_texts(data)]
    for text in texts:
        yield from session.encode_prompt(text)


def way_to_draft(subject: Subject, options: argparse.Namespace, batch: int) -> tuple[str, AnyTree | None]:
    """Drafter and tree for a batch size."""
    session, kind = subject.session, options.drafter
    if options.tree:
        return kind, parse_tree(options.tree)
    if session is None:
        return kind or "none", None
    if kind is None and session.parts.medusa is None and session.parts.path is None:
        return "none", None
    plan = session.plan(kind, batch, note=lambda line: tqdm.write(line, file=sys.stderr))
    return (plan.drafter, plan.shape) if plan.shape.size > 1 else ("none", None)


def table(subject: Subject, options: argparse.Namespace) -> tuple[list[Cell], dict[str, Any]]:
    """The cells for which there is time, checked."""
    batches, contexts = sorted(options.batches), sorted(options.contexts)
    ways = {batch: way_to_draft(subject, options, batch) for batch in batches}
    cells: list[Cell] = []
    left_out: list[dict[str, int]] = []
    began = time.perf_counter()
    pace = reading_pace(subject.model, subject.cut(0, 4 * PIECE))
    pairs = [(batch, context) for batch in batches for context in contexts]
    for batch, context in tqdm(pairs, desc="preparing", file=sys.stderr):
        spent = time.perf_counter() - began + options.rounds * sum(seconds(cell) for cell in cells)
        needs = 0.0
        if cells:
            needs = (options.rounds + 1) * seconds(cells[-1]) * batch / cells[-1].batch
            unread = {"none", ways[batch][0]} - {kind for length, kind in subject.read if length == context}
            needs += len(unread) * context * pace
        if spent + needs > options.limit_seconds:
            left_out.append({"batch": batch, "context": context})
            tqdm.write(f"left out: batch {batch}, context {context}, for want of time", file=sys.stderr)
            continue
        cells.append(prepare(subject, options, batch, context, ways[batch]))
        cells[-1].check(subject, whole=len(cells) == 1)
    return cells, {"left_out": left_out, "limit_seconds": options.limit_seconds}


def reading_pace(model: CausalModel, text: "array[int]") -> float:
    """Seconds that a token of a prompt takes to read, once everything is compiled."""
    generator = Generator(model, prefill_chunk_size=PIECE)
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(generator.prefix(text).decode_state)
    return (time.perf_counter() - began) / len(text)


def prepare(
    subject: Subject, options: argparse.Namespace, batch: int, context: int, way: tuple[str, AnyTree | None]
) -> Cell:
    """Reads a cell's context and stands ready to decode."""
    tails = subject.prompt(context, batch)[1]
    parts = DraftParts(subject.model) if subject.session is None else subject.session.parts
    ways = []
    for kind, tree in dict.fromkeys([("none", None), way]):
        # End tokens do not stop a row: all cells write as much.
        generator = Generator(subject.model, drafter=build_drafter(kind, parts), tree=tree, prefill_chunk_size=PIECE)
        prefix = subject.prefix(generator, kind, context, batch, TAIL + options.tokens + TAIL)
        ways.append(Way(generator, kind, prefix, tails, options.tokens))
    return Cell(batch, context, ways[0], ways[1] if len(ways) > 1 else None)


def far_apart(subject: Subject, options: argparse.Namespace) -> tuple[list[Cell], dict[str, Any]]:
    """Two contexts at batch 1, each read piece by piece with an eye on clock and memory."""
    generator = Generator(subject.model, prefill_chunk_size=PIECE)
    for size in (PIECE // 16, PIECE // 4, PIECE):
        generator.prefix(subject.cut(0, size))
    cells: list[Cell] = []
    readings: list[dict[str, float]] = []
    for context in sorted(options.long):
        text, tails = subject.prompt(context, 1)
        before, began = peak_memory(), time.perf_counter()
        prefix = read_along(generator, text, TAIL + options.tokens + TAIL)
        took = time.perf_counter() - began
        readings.append(
            {
                "context": context,
                "peak_memory_bytes_before": before,
                "peak_memory_bytes_after": peak_memory(),
                "seconds": took,
                "tokens_per_second": len(text) / took,
            }
        )
        print(
            f"read {len(text):,} tokens in {took:.1f} s ({len(text) / took:,.0f} a second), peak memory "
            f"{before / 2**20:,.0f} MiB before, {peak_memory() / 2**20:,.0f} MiB after"
        )
        cells.append(Cell(1, context, Way(generator, "none", prefix, tails, options.tokens), None))
        cells[-1].check(subject, whole=len(cells) == 1)
    return cells, {"reading": readings}


def read_along(generator: Generator, text: "array[int]", room: int) -> Prefix:
    """Reads a prefix as `Generator.prefix` does, with a progress bar."""
    capacity = len(text) + room
    decode_state = init_decode_state(generator.model, generator.drafter, 1, capacity, seen=False)
    modules = Flat.of(generator.model, generator.drafter)
    with tqdm(total=len(text), desc="reading", unit="tokens", unit_scale=True, file=sys.stderr) as bar:
        for begin in range(0, len(text), STRIDE):
            part = text[begin : begin + STRIDE]
            decode_state = prefill(modules, decode_state, [part], generator.prefill_chunk_size)
            jax.block_until_ready(decode_state)
            bar.update(len(part))
    return Prefix(decode_state, len(text), capacity, generator.identity)


def measure(cells: Sequence[Cell], rounds: int) -> None:
    """Decodes every right cell in turn, round after round."""
    turns = [way for cell in cells if cell.correct for way in cell.ways]
    for way in tqdm(turns * rounds, desc="timing", file=sys.stderr):
        way.decode()


def seconds(cell: Cell) -> float:
    """Seconds of one round of a cell, by its first one."""
    return sum(way.rounds[0] for way in cell.ways)


def ratio(plain: Way, drafted: Way) -> float:
    """Speedup by drafts, median over rounds; both ways write as many tokens."""
    return float(np.median(np.divide(plain.rounds[1:], drafted.rounds[1:])))


def per_token(shortest: Cell, cell: Cell) -> float:
    """A plain token's time by that at the shortest context of the batch, median over rounds."""
    return float(np.median(np.divide(cell.plain.rounds[1:], shortest.plain.rounds[1:])))


def agrees(model: CausalModel, prompt: list[int], found: list[int]) -> bool:
    """True if decoded tokens are the likeliest (or tie with them) by a forward pass over the whole text."""
    logits = np.asarray(model(jnp.asarray([prompt + found]))[0, len(prompt) - 1 : -1])
    gaps = logits.max(axis=1) - logits[np.arange(len(found)), found]
    rounding = ROUNDING[jnp.dtype(model.config.dtype).name]
    return bool(np.all(gaps <= rounding * max(float(np.abs(logits).max()), 1.0)))


def peak_memory() -> int:
    """Bytes that the process has held at once so far, on the device if it keeps count, else in the host's memory."""
    stats: dict[str, int] = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES


def line(result: dict[str, Any]) -> str:
    """A cell in words."""
    where = f"batch {result['batch']:>2}, after {result['context']:>9,} tokens: "
    if not result["correct"]:
        return where + "WRONG, no speed is told"
    plain, drafted = result["plain"], result["speculative"]
    said = (
        f"{plain['tokens_per_second']:,.0f} tokens/s, {plain['milliseconds_per_token']:.3f} ms a token "
        f"({result['ratio']:.3f} of the first), state {result['state_bytes']:,} bytes"
    )
    if drafted:
        said += (
            f"; {drafted['drafter']} {drafted['tokens_per_second']:,.0f} tokens/s ({result['speedup']:.2f} times, "
            f"{drafted['mean_accepted_tokens']:.2f} tokens a step)"
        )
    return where + said


if __name__ == "__main__":
    exit_cleanly(main)
