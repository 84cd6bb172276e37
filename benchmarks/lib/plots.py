"""The benchmarks' plots, drawn by matplotlib from their reports."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]

COLOURS = ("#2a6fbb", "#d9772b", "#3f8f4f", "#8a5aa8", "#b04a5a", "#6b7280")
KINDS = {"plain": "#6b7280", "chain": "#d9772b", "tree": "#2a6fbb", "hugging face": "#b9a06a"}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": "#e3e5e8",
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def plot_speed(report: Report, file: str | Path) -> None:
    """Tokens per second over the batch for each context, and milliseconds per token over the context for each batch."""
    results = report["results"]

    def over_batch(axes: "Axes") -> None:
        _curves(axes, results, along="batch", apart="context", figure="tokens_per_second")
        axes.set(title="tokens per second, all rows together", xlabel="batch")

    def over_context(axes: "Axes") -> None:
        _curves(axes, results, along="context", apart="batch", figure="milliseconds_per_token")
        axes.set(title="milliseconds per token of one row", xlabel="tokens of context")

    save_plot(file, (10, 3.8), (over_batch, over_context))


def plot_speculation(report: Report, file: str | Path) -> None:
    """Tokens per second of every contender, and the plan's speed over plain decoding's at every batch size."""

    def contenders(axes: "Axes") -> None:
        rows = [each for each in report["contenders"] if each["tokens_per_second"]]
        rates = [each["tokens_per_second"] for each in rows]
        bars = axes.barh(range(len(rows)), rates, height=0.66, color=[KINDS[each["kind"]] for each in rows])
        labels = [f"{each['tokens_per_second']:,.0f}  ({each['speedup']:.2f}x)" for each in rows]
        axes.bar_label(bars, labels, padding=4)
        axes.set_yticks(range(len(rows)), [each["name"] for each in rows])
        axes.set(xlim=(0, 1.3 * max(rates)), ylim=(len(rows) - 0.4, -0.6), title="tokens per second, batch 1")

    def batches(axes: "Axes") -> None:
        rows = [each for each in report["batches"] if each["ratio"]]
        bars = axes.bar(range(len(rows)), [each["ratio"] for each in rows], width=0.7, color=KINDS["tree"])
        axes.bar_label(bars, [f"{each['ratio']:.2f}\n{each['drafter']}" for each in rows], padding=2, fontsize=7)
        axes.set_xticks(range(len(rows)), [str(each["batch"]) for each in rows])
        axes.axhline(1, color=KINDS["plain"], linewidth=0.8)
        axes.axhline(report["targets"]["batches"]["target"], color=KINDS["plain"], linewidth=0.8, linestyle="--")
        axes.margins(y=0.18)
        axes.set(title="the plan's speed over plain decoding's", xlabel="batch")

    panels = (contenders, batches) if report["batches"] else (contenders,)
    save_plot(file, (5.5 * len(panels), 1.4 + 0.3 * max(len(report["contenders"]), 8)), panels)


def _curves(axes: "Axes", results: Sequence[Report], *, along: str, apart: str, figure: str) -> None:
    """A curve for each value of `apart`: full for plain decoding, dashed with drafts."""
    for number, value in enumerate(sorted({cell[apart] for cell in results})):
        for way, line in (("plain", "-"), ("speculative", "--")):
            cells = [cell for cell in results if cell[apart] == value and cell[way]]
            points = sorted((cell[along], cell[way][figure]) for cell in cells)
            if points:
                label = f"{apart} {value:,}, {way}"
                axes.plot(*zip(*points, strict=True), line, marker="o", color=COLOURS[number % 6], label=label)
    places = sorted({cell[along] for cell in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()


def save_plot(file: str | Path, size: tuple[float, float], panels: Sequence[Callable[["Axes"], None]]) -> None:
    """Draws panels side by side to a file, in the format that its name ends with."""
    # Imported here because it takes its time, and only plots need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            draw(axes)
        figure.savefig(file, dpi=150)
