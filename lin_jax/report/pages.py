"""A report as files: `report.json`, tables in `report.md`, and where matplotlib is installed a picture."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.extras import require
from lin_jax.files import write_durably
from lin_jax.report.figures import BASELINE, TEACHER, ModelFigures, QualityReport, Spread

log = logging.getLogger(__name__)

JSON_FILE, TABLE_FILE, PICTURE_FILE = "report.json", "report.md", "report.png"
_COLOURS = {TEACHER: "#6b7280", BASELINE: "#ea580c"}
_STUDENTS = ("#2563eb", "#16a34a", "#9333ea", "#0891b2", "#ca8a04", "#db2777")


def write_pages(report: QualityReport, folder: Path) -> None:
    """Writes all files of a report into a folder, which is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_finite(report.as_json()), indent=2, allow_nan=False)
    write_durably(folder / JSON_FILE, content + "\n")
    write_durably(folder / TABLE_FILE, markdown(report))
    draw_positions(report, folder / PICTURE_FILE)


def markdown(report: QualityReport) -> str:
    """The report's tables, with a line about how each was measured."""
    sections = [
        f"# Students of {report.teacher}",
        _about(report),
        *(f"* {note}" for note in report.notes),
        _overview(report),
        _explained(report),
        "## Over the teacher, by position in the document",
        _positions(report),
        f"Models were trained on rows of {report.training_length} tokens: what comes after is beyond their training.",
    ]
    if any(each.ablations for each in report.models):
        sections += ["## Over the teacher, without a branch", _ablations(report), "Nothing was trained anew."]
    if report.seeds:
        sections += ["## Seeds: mean ± standard deviation (lowest to highest)", _seeds(report)]
    return "\n\n".join(sections) + "\n"


def draw_positions(report: QualityReport, path: Path) -> None:
    """Draws the ratio to the teacher by position, a line a model; without matplotlib there is no picture."""
    try:
        figure = positions_figure(report)
    except UserError as error:
        log.warning("no picture: %s", error)
        return
    figure.savefig(path, dpi=150)


def positions_figure(report: QualityReport) -> Any:
    """The ratio to the teacher by position, a line a model, as a figure of matplotlib's.

    Raises:
        UserError: there is no matplotlib.
    """
    figure = require("matplotlib.figure", "drawing a report").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    others, colours = [each for each in report.models if each.kind != TEACHER], cycle(_STUDENTS)
    for model in others:
        middle = [(each.begin + each.end) / 2 for each in model.positions]
        baseline = model.kind == BASELINE
        style: Any = {"color": _COLOURS[BASELINE], "linestyle": "--"} if baseline else {"color": next(colours)}
        axes.plot(
            middle, [each.ratio for each in model.positions], marker="o", label=_shown_name(report, model), **style
        )
    axes.axhline(1, color=_COLOURS[TEACHER], linewidth=0.8)
    axes.axvline(report.training_length, color=_COLOURS[TEACHER], linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("position in the document (dotted: training length)")
    axes.set_ylabel("perplexity over the teacher's")
    if others:
        axes.legend(fontsize=8)
    return figure


def _repeated(report: QualityReport, model: ModelFigures) -> bool:
    return sum(each.name == model.name for each in report.models) > 1


def _short_place(model: ModelFigures) -> str:
    return "/".join(Path(model.place).parts[-2:])


def _shown_name(report: QualityReport, model: ModelFigures) -> str:
    return f"{model.name} ({_short_place(model)})" if _repeated(report, model) else model.name


def _about(report: QualityReport) -> str:
    rows = "each row one text" if report.joined else "documents apart"
    return f"{report.tokens:,} tokens of {report.text} in {report.rows} rows of {report.row_length}, {rows}."


def _explained(report: QualityReport) -> str:
    """Says how the figures of the first table were measured."""
    grows = any(each.state_grows for each in report.models)
    sentences = [
        "Over the teacher: perplexity divided by the teacher's, with the interval of 95% of a paired bootstrap over "
        f"{report.rows} rows.",
        f"Equal tokens: of the teacher's own greedy continuations ({report.prompts} prompts, {report.new_tokens} "
        "tokens), at the same place of the model's own, each writing freely;",
        "first difference: median of the tokens before it.",
        f"State: of one sequence{f', marked + where it grows, after {report.row_length} tokens' if grows else ''}.",
    ]
    if any(each.decode_tokens_per_second or each.training_tokens_per_second for each in report.models):
        sentences.append(
            f"Tokens a second on {report.device}: decoding {report.prompts} texts at a time, and training steps, "
            "medians of rounds of all models in turn."
        )
    return " ".join(sentences)


def _overview(report: QualityReport) -> str:
    """The first table, without columns of what was not measured."""
    head = (
        "model",
        "attention",
        "perplexity",
        "over the teacher",
        "equal tokens",
        "first difference",
        "state, KiB",
        "decoding, tokens/s",
        "training, tokens/s",
    )
    rows = [_overview_row(report, each) for each in report.models]
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    return _table([head[at] for at in kept], ([row[at] for at in kept] for row in rows))


def _overview_row(report: QualityReport, model: ModelFigures) -> list[str]:
    over, agreed = model.ratio, model.agreement
    interval = "1" if model.kind == TEACHER else f"{over.value:.4f} ({over.low:.4f} to {over.high:.4f})"
    return [
        _shown_name(report, model),
        model.attention,
        f"{model.perplexity:.4f}",
        interval,
        "" if agreed is None else f"{100 * agreed.equal:.1f}%",
        "" if agreed is None else f"{agreed.first_difference:g}",
        f"{model.state_bytes / 1024:,.1f}{' +' if model.state_grows else ''}",
        _speed(model.decode_tokens_per_second),
        _speed(model.training_tokens_per_second),
    ]


def _positions(report: QualityReport) -> str:
    others = [each for each in report.models if each.kind != TEACHER]
    teacher = report.models[0]
    head = ("positions", "tokens", "teacher's perplexity", *(_shown_name(report, each) for each in others))
    rows = []
    for number, bucket in enumerate(teacher.positions):
        ratios = (f"{each.positions[number].ratio:.4f}" for each in others)
        rows.append([f"{bucket.begin} to {bucket.end - 1}", f"{bucket.tokens:,}", f"{bucket.teacher:.4f}", *ratios])
    return _table(head, rows)


def _ablations(report: QualityReport) -> str:
    students = [each for each in report.models if each.ablations]
    branches = list(dict.fromkeys(name for each in students for name in each.ablations))
    rows = [
        [
            _shown_name(report, each),
            f"{each.ratio.value:.4f}",
            *(f"{each.ablations[name].value:.4f}" if name in each.ablations else "" for name in branches),
        ]
        for each in students
    ]
    return _table(("model", "whole", *(f"without {name}" for name in branches)), rows)


def _seeds(report: QualityReport) -> str:
    names = list(dict.fromkeys(name for each in report.seeds for name in each.figures))
    rows = [[each.name, str(each.seeds), *(_spread(each.figures.get(name)) for name in names)] for each in report.seeds]
    return _table(("model", "seeds", *(name.replace("_", " ") for name in names)), rows)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:.4f} ± {spread.deviation:.4f} ({spread.low:.4f} to {spread.high:.4f})"


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinities: null in their place."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
