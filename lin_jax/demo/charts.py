"""The report's charts: drawn by matplotlib, returned as SVG that takes its colours and font from the page."""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no CSS, so each role has a stand-in colour that is exchanged for the page's in the SVG. Black
# would be left out of the SVG altogether.
INK, MUTED, LINE, SURFACE = "#000001", "#000002", "#000003", "#000004"
BLUE, ORANGE, GREEN = "#000005", "#000006", "#000007"
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    SURFACE: "var(--surface)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lin_jax",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_ID = re.compile(r'(\bid="|url\(#|href="#)')
_FONT = re.compile(r' ?font-family: [^;"]*;?')


def quality_bars(rows: Sequence[tuple[str, float, str]], *, narrow: bool = False) -> Markup:
    """Perplexity over the teacher's: a bar a model from 1, where the teacher stands.

    Args:
        rows: name, ratio and colour.
        narrow: for small screens.
    """
    ratios = [ratio for _, ratio, _ in rows]
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    room = (high - low or 0.01) * (0.55 if narrow else 0.3)

    def draw(axes: "Axes") -> None:
        bars = axes.barh(
            range(len(rows)),
            [ratio - 1 for ratio in ratios],
            left=1,
            height=0.62,
            color=[colour for *_, colour in rows],
        )
        for bar, ratio in zip(bars, ratios, strict=True):
            place = (max(ratio, 1.0), bar.get_y() + bar.get_height() / 2)
            axes.annotate(f"{ratio:.3f}", place, (6, 0), textcoords="offset points", va="center", weight="bold")
        axes.set(xlim=(low - room / 8 if low < 1 else 1, high + room), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axes.set_yticks(range(len(rows)), [_folded(name, narrow) for name, *_ in rows], color=INK)
        axes.spines["bottom"].set_visible(False)
        axes.axvline(1, color=MUTED, linewidth=0.8)

    return _render("quality", "Perplexity over the teacher's", _bars_size(len(rows), narrow), draw, narrow=narrow)


def speed_bars(rows: Sequence[tuple[str, float, float, str]], *, narrow: bool = False) -> Markup:
    """Tokens per second of each way to decode; the dashed line is plain decoding of the linear model, the second row.

    Args:
        rows: name, tokens per second, how many times as fast as plain decoding, and colour.
        narrow: for small screens.
    """
    rates = [rate for _, rate, *_ in rows]
    unit, room = ("/s", 1.75) if narrow else (" tokens/s", 1.36)

    def draw(axes: "Axes") -> None:
        bars = axes.barh(range(len(rows)), rates, height=0.62, color=[colour for *_, colour in rows])
        axes.axvline(rates[1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1.5)
        behind = {"facecolor": SURFACE, "edgecolor": "none", "pad": 1.5}
        for number, (bar, (_, rate, times, _)) in enumerate(zip(bars, rows, strict=True)):
            place = (bar.get_width(), bar.get_y() + bar.get_height() / 2)
            text = f"{rate:,.0f}{unit}" + (f", {times:.2f}×" if number != 1 else "")  # noqa: RUF001
            axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", weight="bold", bbox=behind)
        axes.set(xlim=(0, room * max(rates)), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axes.set_yticks(range(len(rows)), [_folded(name, narrow) for name, *_ in rows], color=INK)
        axes.spines["bottom"].set_visible(False)

    return _render("speed", "Tokens per second", _bars_size(len(rows), narrow), draw, narrow=narrow)


def context_curves(
    name: str, label: str, lengths: Sequence[int], lines: Sequence[tuple[str, Sequence[float | None], str]]
) -> Markup:
    """Draws a quantity over the length of the text, both on logarithmic scales, a line a model.

    Args:
        name: of the chart.
        label: the quantity and its unit.
        lengths: the lengths.
        lines: name, values and colour; a value that was not measured is None.
    """

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import NullFormatter, NullLocator

        for line, values, colour in lines:
            known = [(length, value) for length, value in zip(lengths, values, strict=True) if value is not None]
            if not known:
                continue
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=5)
            above = known[-1][1] >= max((value for _, each, _ in lines for value in each[-1:] if value), default=0)
            axes.annotate(
                f"{line} {_short(known[-1][1])}",
                known[-1],
                (4, 9 if above else -15),
                textcoords="offset points",
                ha="right",
                color=colour,
                weight="bold",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [_count(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.08, 0.25)
        axes.set_title(label, loc="left", color=MUTED, fontsize=9)
        axes.set_xlabel("tokens of text")
        axes.grid(axis="y")

    return _render(name, label, (4.3, 2.8), draw)


def _bars_size(rows: int, narrow: bool) -> tuple[float, float]:
    return (3.5, 0.2 + 0.42 * rows) if narrow else (7.4, 0.3 + 0.48 * rows)


def _folded(name: str, narrow: bool) -> str:
    """A name in two lines, where there is little room."""
    return name.replace(", ", ",\n") if narrow else name


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _count(value: int) -> str:
    return f"{value // 1024}k" if value % 1024 == 0 else str(value)


def _render(
    name: str, label: str, size: tuple[float, float], draw: Callable[["Axes"], None], *, narrow: bool = False
) -> Markup:
    """Draws one figure; `name` tells its ids from those of other SVGs in the page, `label` is read aloud."""
    # Imported here because it takes its time, and only reports need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        out = StringIO()
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    return _inline(out.getvalue(), f"{name}-narrow" if narrow else name, label)


def _inline(svg: str, name: str, label: str) -> Markup:
    """Fits an SVG file into a page: unique ids, the page's colours and font, no prolog or style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _ID.sub(rf"\g<1>{re.sub(r'[^a-z]', '-', name)}-", svg)
    svg = _FONT.sub("", svg)
    for stand_in, colour in _CSS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1).strip())
