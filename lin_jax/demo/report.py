"""The demo's report: one HTML file that needs nothing else, with figures, charts and generated text."""

import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lin_jax.data import StreamDecoder, Tokenizer
from lin_jax.decoding import Generation, TokenOrigin
from lin_jax.decoding.drafting.tree import DraftTree
from lin_jax.demo import charts
from lin_jax.demo.measure import DrafterFigures, best_of, drafted_share

SHOWN_PROMPTS = 4
# Who chose a token, beside those that the loop knows.
PROMPT = 0
_KINDS = {PROMPT: "prompt", TokenOrigin.DRAFT: "draft"}


@dataclass(frozen=True)
class Card:
    """A headline figure.

    Attributes:
        title: what it is.
        value: the figure, with its unit.
        note: a line that explains it.
        before: the figure it is compared with, set in front of it.
    """

    title: str
    value: str
    note: str
    before: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote.

    Attributes:
        number: of the prompt, from 1.
        spans: kind ("prompt", "target" or "draft") and text of each piece; put together they are the whole text.
        drafted: share of the new tokens that came from accepted drafts.
        tokens_per_step: mean over the steps.
    """

    number: int
    spans: list[tuple[str, str]]
    drafted: float
    tokens_per_step: float


def write_report(
    path: Path,
    report: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    figures: list[DrafterFigures],
) -> None:
    """Writes the report as one HTML file, without scripts or links to anything outside it.

    Args:
        path: the file.
        report: what report.json holds.
        tokenizer: gives the text of prompts and generations.
        prompts: token ids.
        figures: of every drafter; `generations` belong to `prompts`, in order.
    """
    best = best_of(figures)
    environment = Environment(
        loader=PackageLoader("lin_jax.demo", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("report.html.j2").render(
        report=report,
        best=best,
        plain=not best.plan.drafts,
        guesses={each.plan.drafter: each.plan.shape.size - 1 for each in figures},
        headline=_headline(report, best),
        cards=_cards(report, best),
        charts=_charts(report, figures, best),
        tree_has_ngrams=any(charts.is_ngram_guess(best.plan.drafter, path) for path in _paths(best)),
        tree_has_heads=not all(charts.is_ngram_guess(best.plan.drafter, path) for path in _paths(best)),
        samples=choose_samples(tokenizer, prompts, best.generations),
        drafted=_mean_share(best.generations),
        prompt_count=len(prompts),
        folder=shlex.quote(path.parent.name if path.is_absolute() else path.parent.as_posix()),
    )
    path.write_text(page, encoding="utf-8")


def choose_samples(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Generation],
    count: int = SHOWN_PROMPTS,
) -> list[Sample]:
    """The prompts whose continuation repeats itself least: those with the most distinct tokens, in their order."""
    variety = sorted(range(len(generations)), key=lambda index: -len(set(generations[index].tokens[0])))
    samples = []
    for index in sorted(variety[:count]):
        generation = generations[index]
        spans = coloured_spans(tokenizer, prompts[index], generation.tokens[0], generation.origins[0])
        per_step = generation.decoded / max(sum(generation.steps), 1)
        samples.append(Sample(index + 1, spans, drafted_share(generation), per_step))
    return samples


def coloured_spans(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], origins: Sequence[int]
) -> list[tuple[str, str]]:
    """Pieces of the text by who chose their tokens: (kind, text), neighbours of one kind in one piece.

    A character that is split over tokens belongs to the last of them.
    """
    decoder = StreamDecoder(tokenizer)
    everything = [*((token, PROMPT) for token in prompt), *zip(tokens, origins, strict=True)]

    def pieces() -> Iterator[tuple[str, str]]:
        for token, origin in everything:
            yield _KINDS.get(origin, "target"), decoder.push([token])
        yield _KINDS.get(everything[-1][1], "target") if everything else "prompt", decoder.flush()

    written = (piece for piece in pieces() if piece[1])
    merged = groupby(written, key=lambda piece: piece[0])
    return [(kind, visible("".join(text for _, text in group))) for kind, group in merged]


def visible(text: str) -> str:
    """The text with control characters, which HTML has no place for, as the pictures that Unicode has of them."""
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _headline(report: dict[str, Any], best: DrafterFigures) -> str:
    if not report["lossless"]:
        return "Speculation changed the text"
    if not best.plan.drafts or report["speedup"] < 1.005:
        return "The same text, no faster on this machine"
    return f"The same text, {report['speedup']:.2f} times as fast"


def _cards(report: dict[str, Any], best: DrafterFigures) -> list[Card]:
    """The headline figures, after the speed-up itself."""
    drafts = best.plan.drafts
    return [
        Card(
            "Tokens per second",
            f"{report['speculative_tokens_per_second']:,.0f}",
            "plain and speculative, one sequence at a time" if drafts else "plain decoding, one sequence at a time",
            before=f"{report['plain_tokens_per_second']:,.0f}" if drafts else "",
        ),
        Card("Tokens per step", f"{report['mean_accepted_tokens']:.2f}", "on average; plain decoding gives 1"),
        Card(
            "Perplexity",
            _short(report["validation_perplexity"]),
            "of held-out text, before and after training",
            before=_short(report["initial_perplexity"]),
        ),
        Card("State per sequence", f"{report['state_bytes_per_sequence'] / 1024:,.0f} KiB", "constant at any length"),
        Card("Training tokens", _count(report["train_tokens"]), "read by the model while it was trained"),
        Card("Wall time", _duration(report["seconds"]), "of the call that wrote this report"),
        Card("Machine", report["device"], "where these figures were measured"),
    ]


def _charts(report: dict[str, Any], figures: Sequence[DrafterFigures], best: DrafterFigures) -> dict[str, Any]:
    """Every chart that there are figures for; a drafter whose plan is plain decoding has none of its own."""
    drafters = {each.plan.drafter: report["drafters"][each.plan.drafter] for each in figures if each.plan.drafts}
    histograms = [each["accepted_histogram"] for each in drafters.values()]
    longest = max(map(len, histograms), default=1)
    highest = max((max(each) / max(sum(each), 1) for each in histograms), default=1.0)
    curves: list[tuple[str, Markup]] = []
    if len(report.get("losses", ())) > 1:
        curves.append(("Training loss", charts.loss_curve(report["losses"])))
    if len(report.get("validation", ())) > 1:
        curves.append(("Perplexity of held-out text", charts.perplexity_curve(report["validation"])))
    accuracy = report.get("head_accuracy")
    return {
        "curves": curves,
        "heads": charts.head_table(accuracy) if accuracy else None,
        "accepted_histogram": {
            name: charts.yield_bars(name, each["accepted_histogram"], longest, highest or 1.0)
            for name, each in drafters.items()
        },
        "speed": charts.speed_bars(report["plain_tokens_per_second"], drafters),
        "speed_narrow": charts.speed_bars(report["plain_tokens_per_second"], drafters, narrow=True),
        "tree": charts.tree_drawing(best.plan.drafter, DraftTree(_paths(best))) if _paths(best) else None,
    }


def _paths(figures: DrafterFigures) -> tuple[tuple[int, ...], ...]:
    """The tree's paths; a dynamic tree has none to draw."""
    tree = figures.plan.shape
    return tree.paths if isinstance(tree, DraftTree) else ()


def _mean_share(generations: Sequence[Generation]) -> float:
    return sum(map(drafted_share, generations)) / max(len(generations), 1)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _count(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
