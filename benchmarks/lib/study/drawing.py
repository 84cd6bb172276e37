"""Tables and plots of the study."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from lib.plots import COLOURS, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Bars of ratios are cut here: what is far worse is only far worse.
MOST = 4.0


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; nothing without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |", *lines] if lines else []


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean of the seeds, and their standard deviation where there are several."""
    if not values:
        return "-"
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {stdev(values):.{digits}f}"


def grouped(results: Mapping[str, Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Results that have all of some keys, by their values of these, in order."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results.values():
        if all(key in result for key in keys):
            found.setdefault(tuple(result[key] for key in keys), []).append(result)
    return found


def draw_bars(bars: Mapping[str, float], title: str, file: Path, *, most: float | None = None, line: float = 1) -> bool:
    """Draws a bar for each name, longer ones cut at `most`; False without any."""
    if not bars:
        return False

    def panel(axes: "Axes") -> None:
        values = [value if most is None else min(value, most) for value in bars.values()]
        drawn = axes.barh(range(len(values)), values, height=0.66, color=COLOURS[0])
        axes.bar_label(drawn, [f"{value:,.3g}" for value in bars.values()], padding=3)
        axes.set_yticks(range(len(values)), list(bars))
        axes.axvline(line, color=COLOURS[5], linewidth=0.8, linestyle="--")
        axes.set(title=title, xlim=(0, 1.12 * max(*values, line)), ylim=(len(values) - 0.4, -0.6))

    save_plot(file, (8, 1 + 0.26 * max(len(bars), 4)), (panel,))
    return True


def draw_lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, along: str, file: Path, *, high: bool = False
) -> bool:
    """Draws a curve of points for each name over a logarithmic axis; False without any.

    Args:
        curves: points by name.
        title: of the plot.
        along: of the axis.
        file: to draw to.
        high: whether the other axis is logarithmic, too.
    """
    if not any(curves.values()):
        return False

    def panel(axes: "Axes") -> None:
        for number, (name, points) in enumerate(curves.items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker="o", color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_xscale("log", base=2)
        if high:
            axes.set_yscale("log")
        axes.grid(axis="y")
        axes.set(title=title, xlabel=along)
        axes.legend()

    save_plot(file, (8, 4), (panel,))
    return True
