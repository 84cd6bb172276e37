"""The demo's report: one HTML file that needs nothing else, with figures, charts and generated text."""

import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lin_jax.data import StreamDecoder, Tokenizer
from lin_jax.decoding import TokenOrigin
from lin_jax.decoding.autotune.plan import PLAIN
from lin_jax.demo import charts
from lin_jax.demo.runs import BARE, BEST
from lin_jax.files import write_durably

SHOWN_PROMPTS = 4
# Who chose a token, beside those that the loop knows.
PROMPT = 0
_KINDS = {PROMPT: "prompt", TokenOrigin.DRAFT: "draft"}
# Parts of the demo in words.
PARTS = {"quality": "measuring perplexities", "head": "draft head", "decoding": "decoding", "context": "long texts"}


@dataclass(frozen=True)
class Card:
    """A headline figure.

    Attributes:
        title: what it is.
        value: the figure, with its unit.
        note: a line that explains it.
        before: the figure it is compared with, set in front of it.
        verdict: a word on it, such as "Same text: yes".
        good: whether that is as wanted.
    """

    title: str
    value: str
    note: str
    before: str = ""
    verdict: str = ""
    good: bool = True


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote.

    Attributes:
        number: of the prompt, from 1.
        spans: kind ("prompt", "target" or "draft") and text of each piece; put together they are the whole text.
        drafted: share of the new tokens that came from accepted drafts.
    """

    number: int
    spans: list[tuple[str, str]]
    drafted: float


def write_report(path: Path, report: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Writes the report as one HTML file, without scripts or links to anything outside it.

    Args:
        path: the file.
        report: what report.json holds.
        tokenizer: gives the text of prompts and generations.
    """
    environment = Environment(
        loader=PackageLoader("lin_jax.demo", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    samples = report["samples"]
    page = environment.get_template("report.html.j2").render(
        report=report,
        best_name=BEST,
        bare_name=BARE,
        plain=report["best_drafter"] == PLAIN,
        main_line="; ".join(each["text"] for each in report["findings"][:2]),
        cards=_cards(report),
        charts=_charts(report),
        shares=_shares(report["seconds"]),
        samples=choose_samples(tokenizer, samples),
        drafted=sum(map(drafted_share, samples)) / max(len(samples), 1),
        folder=shlex.quote(path.parent.name if path.is_absolute() else path.parent.as_posix()),
    )
    write_durably(path, page)


def choose_samples(
    tokenizer: Tokenizer, samples: Sequence[Mapping[str, Any]], count: int = SHOWN_PROMPTS
) -> list[Sample]:
    """The prompts whose continuation repeats itself least: those with the most distinct tokens, in their order."""
    variety = sorted(range(len(samples)), key=lambda index: -len(set(samples[index]["tokens"])))
    return [
        Sample(index + 1, coloured_spans(tokenizer, **samples[index]), drafted_share(samples[index]))
        for index in sorted(variety[:count])
    ]


def drafted_share(sample: Mapping[str, Any]) -> float:
    """Share of the new tokens that came from accepted drafts."""
    origins = sample["origins"]
    return sum(origin == TokenOrigin.DRAFT for origin in origins) / max(len(origins), 1)


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


def _cards(report: Mapping[str, Any]) -> list[Card]:
    """The headline figures."""
    best = report["students"][BEST]
    same = report["lossless"]
    drafts = report["best_drafter"] != PLAIN
    return [
        Card(
            "Perplexity over the teacher's",
            f"{best['ratio']:.3f}×",  # noqa: RUF001
            f"{BEST}, {best['perplexity']:,.2f} against {report['teacher_perplexity']:,.2f} on held-out text",
        ),
        Card(
            "Speed-up by drafts",
            f"{report['speedup']:.2f}×",  # noqa: RUF001
            f"over plain decoding; drafts: {report['best_drafter']}" if drafts else "nothing was drafted",
            verdict=f"Same text: {'yes' if same else 'no'}",
            good=same,
        ),
        Card(
            "Tokens per second",
            f"{report['speculative_tokens_per_second']:,.0f}",
            f"one sequence; plain and with drafts. The softmax teacher: {report['softmax_tokens_per_second']:,.0f}"
            if drafts
            else f"one sequence. The softmax teacher: {report['softmax_tokens_per_second']:,.0f}",
            before=f"{report['plain_tokens_per_second']:,.0f}" if drafts else "",
        ),
        Card(
            "State of a sequence",
            f"{report['state_bytes'] / 1024:,.0f} KiB",
            "at any length; a softmax cache grows with the text",
        ),
        Card("Time", _duration(report["seconds"]["total"]), "for all parts below"),
        Card("Machine", report["cpu"], "where everything here was measured"),
    ]


def _charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    colours = {BEST: charts.BLUE}
    quality = [(name, each["ratio"], colours.get(name, charts.GREEN)) for name, each in report["students"].items()]
    quality += [(name, each["ratio"], charts.MUTED) for name, each in report["baselines"].items()]
    softmax, plain = report["softmax_tokens_per_second"], report["plain_tokens_per_second"]
    speed = [
        ("softmax teacher, plain", softmax, softmax / plain, charts.ORANGE),
        (f"{BEST}, plain", plain, 1.0, charts.MUTED),
        *(
            (f"{BEST}, {name}", each["tokens_per_second"], each["speedup"], charts.BLUE)
            for name, each in report["drafters"].items()
        ),
    ]
    found = {}
    for suffix, narrow in (("", False), ("_narrow", True)):
        found[f"quality{suffix}"] = charts.quality_bars(quality, narrow=narrow)
        found[f"speed{suffix}"] = charts.speed_bars(speed, narrow=narrow)
    return found | _context_charts(report["context"])


def _context_charts(context: Mapping[str, Any]) -> dict[str, Markup]:
    if not context["lengths"]:
        return {}
    colours = {"linear": charts.BLUE, "softmax": charts.ORANGE}
    times = [(name, context[name]["milliseconds"], colour) for name, colour in colours.items()]
    sizes = [
        (name, [None if size is None else size / 2**20 for size in context[name]["state_bytes"]], colour)
        for name, colour in colours.items()
    ]
    lengths = context["lengths"]
    return {
        "time": charts.context_curves("time", "milliseconds per token", lengths, times),
        "state": charts.context_curves("state", "MiB of state or cache", lengths, sizes),
    }


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Each part in words, its seconds, and their share of the longest part's."""
    parts = {name: taken for name, taken in seconds.items() if name != "total"}
    longest = max(parts.values(), default=1.0) or 1.0
    return [(PARTS.get(name, name), taken, taken / longest) for name, taken in parts.items()]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
