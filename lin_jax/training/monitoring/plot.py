"""The curves of one run, or of several in one picture: `python -m lin_jax plot RUN [RUN ...]`."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lin_jax.errors import UserError
from lin_jax.extras import require
from lin_jax.training.monitoring.trackers import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777")
_MUTED = "#6b7280"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#d1d5db",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelcolor": _MUTED,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True)
class Panel:
    """One of the picture's diagrams.

    Attributes:
        title: what it shows, with its unit.
        figure: name of the figure in the metrics.
        smooth: whether the figure is noisy, and a smooth line drawn over it.
        logarithmic: whether its scale is.
        place: where it stands: rows and columns of a grid of 3 x 6.
    """

    title: str
    figure: str
    place: tuple[slice, slice]
    smooth: bool = False
    logarithmic: bool = False


PANELS = (
    Panel("loss, nats per token", "loss", (slice(0, 2), slice(0, 3)), smooth=True),
    Panel("validation loss, nats per token", "validation_loss", (slice(0, 2), slice(3, 6))),
    Panel("norm of the gradient", "grad_norm", (slice(2, 3), slice(0, 2)), smooth=True, logarithmic=True),
    Panel("learning rate", "learning_rate", (slice(2, 3), slice(2, 4))),
    Panel("tokens per second", "tokens_per_second", (slice(2, 3), slice(4, 6)), smooth=True),
)


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, under the name that the picture gives it."""

    name: str
    lines: Sequence[dict[str, Any]]

    def points(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[N]` and values `[N]` of a figure, where it is a number."""
        known = [(line["step"], line[figure]) for line in self.lines if line.get(figure) is not None]
        steps, values = np.array(known, np.float64).reshape(-1, 2).T
        return steps, values

    @property
    def troubles(self) -> list[int]:
        """Steps at which an update turned out to be left out, or the run rolled back."""
        counted = [(line["step"], line["left_out"] + line["roll_backs"]) for line in self.lines if "left_out" in line]
        return [step for (_, before), (step, after) in pairwise(counted) if after > before]


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """The curves of runs, under the shortest names that tell them apart.

    Raises:
        UserError: a folder is not that of a run.
    """
    curves = []
    for run, name in zip(runs, _names(runs), strict=True):
        if not (run / METRICS_FILE).exists():
            raise UserError(f"{run} holds no {METRICS_FILE}; give the output folder of a train.py run")
        curves.append(Curves(name, read_metrics(run / METRICS_FILE)))
    return curves


def _names(runs: Sequence[Path]) -> list[str]:
    paths = [run.absolute() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def draw(curves: Sequence[Curves], path: Path) -> None:
    """Draws the curves into a file, whose suffix says of what kind: .png, .svg or .pdf.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    # Imported here because it takes its time, and is not among the packages that training needs.
    # The first picture on a machine would warn that fonts are being looked for.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    matplotlib = require("matplotlib", "drawing curves")
    figures = require("matplotlib.figure", "drawing curves")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(12, 7.5), dpi=120, layout="constrained")
        grid = figure.add_gridspec(3, 6)
        for panel in PANELS:
            _fill(figure.add_subplot(grid[panel.place]), panel, curves)
        handles = [_handle(each, colour) for each, colour in zip(curves, _colours(len(curves)), strict=True)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=10)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {error}; give another --output") from error


def _fill(axes: "Axes", panel: Panel, curves: Sequence[Curves]) -> None:
    """One diagram, with a line for each run."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    positive = True
    for each, colour in zip(curves, _colours(len(curves)), strict=True):
        steps, values = each.points(panel.figure)
        positive &= bool(np.all(values > 0))
        marker = "o" if panel.figure.startswith("validation") or len(steps) == 1 else None
        if panel.smooth and len(steps) >= 20:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            steps, values = smoothed(steps, values)
        axes.plot(steps, values, color=colour, linewidth=1.7, marker=marker, markersize=3.5)
        if panel.figure == "loss":
            for step in each.troubles:
                axes.axvline(step, color=colour, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.8)
    if panel.logarithmic and positive:
        _set_logarithmic(axes)
    troubled = panel.figure == "loss" and any(each.troubles for each in curves)
    axes.set_title(panel.title + ("; dashed: updates left out or undone" if troubled else ""), color=_MUTED)
    axes.set_xlabel("step")


def _set_logarithmic(axes: "Axes") -> None:
    """A logarithmic scale with numbers that people write."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of neighbouring values `[N]`, which single outliers do not move, at the means of their steps `[N]`."""
    count = min(len(values) // 4, 80)
    middles = [np.median(part) for part in np.array_split(values, count)]
    return np.array([np.mean(part) for part in np.array_split(steps, count)]), np.array(middles)


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _handle(curves: Curves, colour: str) -> Any:
    from matplotlib.lines import Line2D

    losses = curves.points("validation_loss")[1]
    last = f", validation loss {losses[-1]:.4g}" if losses.size and math.isfinite(losses[-1]) else ""
    return Line2D([], [], color=colour, linewidth=2.5, label=curves.name + last)


def draw_at_end(run: Path, note: Callable[[str], None]) -> None:
    """Draws a finished run's curves into its folder; a line says where, or why not."""
    try:
        draw(read_curves([run]), run / CURVES_FILE)
    except UserError as error:
        note(f"no curves: {error}")
        return
    note(f"curves: {run / CURVES_FILE}")
