"""Part 4: long texts: perplexity by position on whole novels, and what a token costs after a text of any length."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lib.study.attentions import AUGMENTED
from lib.study.cells import BROAD, DEEP, FIRST, LAST, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import draw_lines, markdown_table
from lib.study.linearize import NAME as LINEARIZE
from lib.study.linearize import TEACHER, WHOLE, cell_name
from lib.study.models import OWN, Model, load_student, load_teacher, novel, state_bytes

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator
from lin_jax.decoding.scoring import ContinuationScorer
from lin_jax.evaluation.token_losses import position_edges
from lin_jax.models import CausalModel
from lin_jax.training.model_source import with_attention

NAME = "long"
# The augmentation around a memory with a normaliser: that of FLASH's global attention is a plain sum over all groups.
NORMALISED = "relu+local+convolution"
# Softmax over all of a text, and over a window of it, are the teacher's.
SOFTMAX, WINDOW = "softmax", "softmax of a window"
LINEAR = (AUGMENTED, NORMALISED, "elu", "hedgehog", "exponential+window")
TURNS = {AUGMENTED: FIRST, NORMALISED: FIRST, SOFTMAX: BROAD, WINDOW: BROAD, "exponential+window": DEEP}
# Softmax reads no longer text than this: its time grows with the square.
SOFTMAX_TOKENS = 16384
# Losses of position compared, and how much better the later may be said to be for no reason.
WARM, GROWTH = 1024, 2.0
# Times of a token that are taken for the same.
STEADY = 1.25
# Tokens of the text behind a prefix.
WRITTEN = 128
# What is measured after a text of some length, by the head of its table.
SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ms a token, by tokens before": lambda each: f"{each['milliseconds_per_token']:.2f}",
    "seconds to read them": lambda each: f"{each['seconds_of_reading']:.2f}",
    "state, bytes": lambda each: f"{each['state_bytes']:,}",
}


def cells(setup: Setup) -> list[Cell]:
    """Perplexity by position, then latency, for the teacher and its students."""
    model = OWN if setup.quick else WHOLE
    names = (AUGMENTED,) if setup.quick else (SOFTMAX, WINDOW, *LINEAR)
    found = []
    for attention in names:
        needs = [TEACHER] if model == OWN else []
        if attention not in (SOFTMAX, WINDOW):
            needs.append(f"{LINEARIZE}/{cell_name(model, attention, 0)}")
        for what, run, minutes in (("perplexity", by_position, 0.5), ("latency", latency, 0.5)):
            cell = partial(run, model=model, attention=attention)
            turn = TURNS.get(attention, LAST)
            found.append(Cell(f"{what}/{model}/{attention}", cell, minutes, tuple(needs), turn))
    return found


def _load(setup: Setup, model: str, attention: str) -> Model:
    if attention not in (SOFTMAX, WINDOW):
        return load_student(setup, LINEARIZE, cell_name(model, attention, 0), load_teacher(setup, model), attention)
    teacher = load_teacher(setup, model)
    if attention == SOFTMAX:
        return teacher
    window = AttentionConfig("softmax", window=setup.sizes.group)
    return Model(with_attention(teacher.model, window), teacher.tokenizer, teacher.ends)


def by_position(setup: Setup, *, model: str, attention: str) -> dict[str, Any]:
    """Perplexity of a whole text, all of which stands before each token, by position."""
    found, longest = _load(setup, model, attention), setup.sizes.long
    tokens = novel(setup, found.tokenizer, min(longest, SOFTMAX_TOKENS) if attention == SOFTMAX else longest)
    began = time.perf_counter()
    (scores,) = ContinuationScorer(found.model, batch_size=1, share=False).score([(tokens[:1], tokens[1:])])
    losses = -np.asarray(scores.log_probs, np.float64)
    edges = position_edges(setup.sizes.length, len(losses))
    return {
        "model": model,
        "attention": attention,
        "positions": [
            {"begin": begin, "end": end, "perplexity": math.exp(min(float(losses[begin:end].mean()), 700))}
            for begin, end in pairwise(edges)
            if end > begin
        ],
        "tokens_per_second": len(losses) / (time.perf_counter() - began),
    }


def latency(setup: Setup, *, model: str, attention: str) -> dict[str, Any]:
    """Seconds to read texts of several lengths, milliseconds a token after them, and the state's size."""
    found, rows = _load(setup, model, attention), []
    contexts = setup.sizes.contexts
    tokens = novel(setup, found.tokenizer, contexts[-1])
    for context in contexts:
        read, written = _times(found.model, tokens[:context], setup.sizes.rounds)
        rows.append(
            {
                "context": context,
                "seconds_of_reading": read,
                "milliseconds_per_token": 1e3 * written,
                "state_bytes": state_bytes(found.model, context),
            }
        )
    return {"model": model, "attention": attention, "contexts": rows}


def _times(model: CausalModel, tokens: list[int], rounds: int) -> tuple[float, float]:
    """Medians of the seconds to read a text, and to write a token after it; programs are compiled before."""
    generator, read, written = Generator(model), [], []
    for turn in range(rounds + 1):
        began = time.perf_counter()
        done = generator.generate([tokens], WRITTEN)
        seconds = done.prefill_seconds
        assert seconds <= time.perf_counter() - began
        if turn:
            read.append(seconds)
            written.append(done.decode_seconds / max(done.decoded, 1))
    return median(read), median(written)


def table(results: Results) -> list[str]:
    """Perplexities by position; then times of a token, times of reading, and states, by the tokens before."""
    lines = _by_place(
        results, "positions", "perplexity, by tokens before", _span, lambda each: f"{each['perplexity']:,.2f}"
    )
    for head, shown in SHOWN.items():
        lines += _by_place(results, "contexts", head, lambda each: f"{each['context']:,}", shown)
    return lines[1:]


def _span(each: Mapping[str, Any]) -> str:
    return f"{each['begin']:,} to {each['end']:,}"


def _by_place(
    results: Results, key: str, head: str, place: Callable[[Any], str], shown: Callable[[Any], str]
) -> list[str]:
    """A table with a row for each place in a text, and a column for each attention."""
    columns = [each for each in results.values() if key in each]
    if not columns:
        return []
    longest = max((each[key] for each in columns), key=len)
    rows = [
        [place(each), *(shown(column[key][row]) if row < len(column[key]) else "-" for column in columns)]
        for row, each in enumerate(longest)
    ]
    return ["", *markdown_table([head, *(f"`{each['attention']}`" for each in columns)], rows)]


def plot(results: Results, file: Path) -> bool:
    """A curve of perplexity over position for each attention."""
    curves = {
        each["attention"]: [(place["end"], place["perplexity"]) for place in each["positions"]]
        for each in results.values()
        if "positions" in each
    }
    return draw_lines(curves, "perplexity", "tokens from the beginning", file, high=True)


def stays_good(results: Results) -> tuple[Verdict, str]:
    """Decides whether augmented attention is no worse far into a text than near its beginning."""
    found = {each["attention"]: each["positions"] for each in results.values() if "positions" in each}
    if AUGMENTED not in found or not _far(found[AUGMENTED]):
        return None, ""
    best = min(place["perplexity"] for place in found[AUGMENTED] if place["end"] <= WARM)
    worst = max(_far(found[AUGMENTED]))
    bad = [
        place["begin"] for place in found[AUGMENTED] if place["begin"] >= WARM and place["perplexity"] > GROWTH * best
    ]
    figures = f"perplexity of {best:,.0f} at best in the first {WARM:,} tokens, {worst:,.0f} at worst after them"
    figures += f", more than {GROWTH:g} times as high from token {bad[0]:,} on" if bad else ""
    for name, what in ((NORMALISED, "with a normalised memory"), (WINDOW, "the teacher without any")):
        if name in found and (far := _far(found[name])):
            first = min(place["perplexity"] for place in found[name] if place["end"] <= WARM)
            figures += f"; {what} ({name}) {first:,.0f} and {max(far):,.0f}, {far[-1]:,.0f} at the end"
    return not bad, figures


def _far(positions: Sequence[Mapping[str, Any]]) -> list[float]:
    return [place["perplexity"] for place in positions if place["begin"] >= WARM]


def constant_time(results: Results) -> tuple[Verdict, str]:
    """Decides whether a token costs the same after any text by linear attention, and the state is as large.

    Softmax of a window, which looks at as many tokens everywhere, tells what the machine makes of the same work.
    """
    found = {each["attention"]: each["contexts"] for each in results.values() if "contexts" in each}
    growth = {
        name: rows[-1]["milliseconds_per_token"] / rows[0]["milliseconds_per_token"] for name, rows in found.items()
    }
    linear = {name: rows for name, rows in found.items() if name not in (SOFTMAX, WINDOW)}
    if not linear:
        return None, ""
    worst = max(growth[name] for name in linear)
    same = all(len({each["state_bytes"] for each in rows}) == 1 for rows in linear.values())
    lengths = [each["context"] for each in next(iter(linear.values()))]
    figures = f"at most {worst:.2f} times as long after {lengths[-1]:,} tokens as after {lengths[0]:,}"
    others = [f"{name} {growth[name]:.2f}" for name in (WINDOW, SOFTMAX) if name in growth]
    figures += f" ({', '.join(others)})" if others else ""
    figures += "; a state of the same size" if same else "; a state that grows"
    return same and worst < max(STEADY, 1.1 * growth.get(WINDOW, 0)), figures


PART = Part(
    NAME,
    "Long context",
    "Whole novels are read from their beginning, all before a token; latency is that of one text on one machine. "
    "Teacher and students know stories of some hundred words, and novels are foreign to them: to guess evenly among "
    "the 512 tokens of stories260K has a perplexity of 512. How high one is says little here, how it goes on does.",
    cells,
    table,
    plot,
    (
        Claim("Augmented attention stays as good far beyond its training length.", stays_good),
        Claim("A token takes as long, and the state is as large, after any text.", constant_time),
    ),
    timed="contexts",
)
