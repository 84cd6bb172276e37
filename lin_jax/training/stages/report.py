"""Report of the stages of a pipeline: `report.json`, `report.md`, and a picture where matplotlib is installed."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from lin_jax.errors import UserError
from lin_jax.extras import require
from lin_jax.files import write_durably

log = logging.getLogger(__name__)

REPORT_FILE, TABLE_FILE, PICTURE_FILE = "report.json", "report.md", "report.png"


@dataclass(frozen=True)
class StageResult:
    """A model that was measured, or a stage that has none to measure.

    Attributes:
        stage: the stage that it belongs to.
        name: what the model is called.
        what: what was done to it.
        steps: optimiser steps of that.
        seconds: training time of that.
        loss: mean cross entropy of the held-out text, in nats a token; None if there is no model.
        perplexity: its exponential.
        tokens: how many tokens were predicted.
    """

    stage: str
    name: str
    what: str
    steps: int
    seconds: float
    loss: float | None = None
    perplexity: float | None = None
    tokens: int = 0


class StageReport:
    """Rows of all stages that are finished; they are on disk as soon as they are added.

    Args:
        path: the JSON file.
        rows: the rows that it has.
    """

    def __init__(self, path: Path, rows: list[StageResult]) -> None:
        self.path = path
        self.rows = rows

    @classmethod
    def open(cls, path: Path) -> "StageReport":
        """The report in a file; an empty one, if there is no file.

        Raises:
            UserError: the file holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            return cls(path, [StageResult(**row) for row in content])
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a report of stages ({error}); move it away") from None

    def holds(self, stage: str, steps: int) -> bool:
        """True if a stage is finished, after at least so many steps."""
        return any(row.stage == stage and row.name == stage and row.steps >= steps for row in self.rows)

    def add(self, stage: str, rows: list[StageResult]) -> None:
        """Puts the rows of a stage in place of those it had."""
        self.rows = [*(row for row in self.rows if row.stage != stage), *rows]
        write_durably(self.path, json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")

    def table(self) -> str:
        """The rows as a table of Markdown."""
        lines = ["| model | what was done | steps | training time | nats a token | perplexity |", "| --- " * 6 + "|"]
        for row in self.rows:
            loss, perplexity = (
                "" if value is None else f"{value:.{digits}f}" for value, digits in ((row.loss, 4), (row.perplexity, 3))
            )
            time = f"{row.seconds:.0f} s" if row.steps else ""
            lines.append(f"| {row.name} | {row.what} | {row.steps or ''} | {time} | {loss} | {perplexity} |")
        return "\n".join(lines)

    def finish(self) -> None:
        """Writes the table and the picture."""
        tokens = max((row.tokens for row in self.rows), default=0)
        note = f"\n\nPerplexity of {tokens:,} tokens of held-out text.\n"
        self.path.with_name(TABLE_FILE).write_text(self.table() + note, encoding="utf-8")
        _draw(self.rows, self.path.with_name(PICTURE_FILE))


def _draw(rows: list[StageResult], path: Path) -> None:
    """A bar for each model."""
    try:
        figures = require("matplotlib.figure", "drawing a report")
    except UserError as error:
        log.warning("no picture: %s", error)
        return
    measured = [(row, row.perplexity) for row in rows if row.perplexity is not None]
    figure = figures.Figure(figsize=(7, 0.5 + 0.5 * max(len(measured), 1)), layout="constrained")
    axes = figure.subplots()
    colors = ["#888888" if row.steps == 0 else "#2a6f97" for row, _ in measured]
    bars = axes.barh([row.name for row, _ in measured], [value for _, value in measured], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.margins(x=0.15)
    axes.set_xlabel("perplexity of held-out text")
    figure.savefig(path, dpi=150)
