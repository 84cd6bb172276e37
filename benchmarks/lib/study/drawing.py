"""Tables and plots of the study."""

from collections.abc import Container, Iterable, Mapping, Sequence
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


def training_seconds(results: Sequence[Mapping[str, Any]]) -> str:
    """The mean of the seeds, in parentheses where other work had the processor, too."""
    shown = f"{mean(each['seconds_of_training'] for each in results):,.0f}"
    return shown if all(each.get("alone", True) for each in results) else f"({shown})"


def grouped(results: Mapping[str, Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Results that have all of some keys, by their values of these, in order."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results.values():
        if all(key in result for key in keys):
            found.setdefault(tuple(result[key] for key in keys), []).append(result)
    return found


def draw_bars(
    bars: Mapping[str, float],
    title: str,
    file: Path,
    *,
    most: float | None = None,
    line: float = 1,
    marked: Container[str] = (),
) -> bool:
    """Draws a bar for each name; False without any.

    Args:
        bars: values by name.
        title: of the plot.
        file: to draw to.
        most: where longer bars are cut, which are pale then.
        line: a value to compare with.
        marked: names whose bars have another colour.
    """
    if not bars:
        return False
    cut = {name for name, value in bars.items() if most is not None and value > most}

    def panel(axes: "Axes") -> None:
        values = [most if name in cut and most is not None else value for name, value in bars.items()]
        colours = [to_rgba(COLOURS[name in marked], 0.5 if name in cut else 1.0) for name in bars]
        drawn = axes.barh(range(len(values)), values, height=0.66, color=colours)
        axes.bar_label(drawn, [f"{value:,.3g}" for value in bars.values()], padding=3)
        axes.set_yticks(range(len(values)), list(bars))
        axes.axvline(line, color=COLOURS[5], linewidth=0.8, linestyle="--")
        shown = f"{title} (pale bars are cut at {most:g})" if cut else title
        axes.set(title=shown, xlim=(0, 1.12 * max(*values, line)), ylim=(len(values) - 0.4, -0.6))

    # Imported here because it takes its time, and only plots need it.
    from matplotlib.colors import to_rgba

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
        axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
        if high:
            axes.set_yscale("log")
        axes.grid(axis="y")
        axes.set(title=title, xlabel=along)
        axes.legend()

    save_plot(file, (8, 4), (panel,))
    return True
