"""The report's charts: drawn by matplotlib, returned as SVG that takes its colours and font from the page."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lin_jax.decoding.drafting.drafters.medusa import HEAD_WIDTH
from lin_jax.decoding.drafting.tree import DraftTree

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
DRAFTER_COLOURS = {"medusa": BLUE, "ngram": ORANGE, "medusa+ngram": GREEN}
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


def loss_curve(losses: Sequence[Sequence[float]]) -> Markup:
    """Training loss over steps, `[[step, loss], ...]`."""

    def draw(axes: "Axes") -> None:
        axes.plot(*zip(*losses, strict=True), color=BLUE)
        step, loss = losses[-1]
        axes.annotate(f"{loss:.2f}", (step, loss), (0, 7), textcoords="offset points", ha="right", weight="bold")
        _style_curve(axes, "loss, nats per token")

    return _render("loss", f"Training loss, {losses[-1][1]:.2f} in the end", (4.3, 2.6), draw)


def perplexity_curve(validation: Sequence[Sequence[float]]) -> Markup:
    """Perplexity of held-out text over two or more steps, `[[step, perplexity], ...]`, on a logarithmic scale."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import NullFormatter

        axes.plot(*zip(*validation, strict=True), color=ORANGE, marker="o", markersize=5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.06, 0.14)
        for index, side, shift in ((0, "left", (8, 2)), (-1, "right", (2, 9))):
            step, value = validation[index]
            label = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
            axes.annotate(label, (step, value), shift, textcoords="offset points", ha=side, weight="bold")
        _style_curve(axes, "perplexity, log scale")

    return _render("perplexity", f"Perplexity, {validation[-1][1]:.1f} in the end", (4.3, 2.6), draw)


def _style_curve(axes: "Axes", quantity: str) -> None:
    axes.set_title(quantity, loc="left", color=MUTED, fontsize=9)
    axes.set_xlabel("step")
    axes.grid(axis="y")


def head_table(accuracy: Sequence[Sequence[float]]) -> Markup:
    """Accuracy of guess r of head m, `[M][R]`: a heat map with the figures in it, and each head's sum."""
    ranks = len(accuracy[0])
    highest = max(max(map(max, accuracy)), 1e-9)

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for head, shares in enumerate(accuracy):
            for rank, share in enumerate(shares):
                alpha = 0.04 + 0.5 * (share / highest) ** 0.7
                axes.add_patch(Rectangle((rank + 0.02, head + 0.03), 0.96, 0.94, facecolor=BLUE, alpha=alpha))
                axes.text(rank + 0.5, head + 0.5, f"{100 * share:.1f}", ha="center", va="center")
            total = f"{100 * sum(shares):.1f}"
            axes.text(ranks + 0.75, head + 0.5, total, ha="center", va="center", weight="bold")
        axes.set(xlim=(0, ranks + 1.25), ylim=(len(accuracy), 0))
        axes.set_xticks([*(rank + 0.5 for rank in range(ranks)), ranks + 0.75])
        axes.set_xticklabels([*(str(rank + 1) for rank in range(ranks)), "any of them"])
        axes.set_yticks([head + 0.5 for head in range(len(accuracy))])
        axes.set_yticklabels([f"head {head + 1}" for head in range(len(accuracy))])
        axes.set_xlabel("rank of the guess")
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    label = "Share of right guesses in percent, by head and rank"
    return _render("heads", label, (9.6, 0.7 + 0.42 * len(accuracy)), draw)


def yield_bars(name: str, accepted_histogram: Sequence[int], longest: int, highest: float) -> Markup:
    """Draws how often a step of one drafter gave 1, 2, ... tokens.

    Args:
        name: the drafter.
        accepted_histogram: the counts.
        longest: most tokens per step of any drafter, where the axis ends.
        highest: largest share of any drafter.
    """
    steps = max(sum(accepted_histogram), 1)
    shares = [count / steps for count in accepted_histogram]
    mean = sum(tokens * share for tokens, share in enumerate(shares, 1))

    def draw(axes: "Axes") -> None:
        bars = axes.bar(range(1, len(shares) + 1), shares, width=0.78, color=drafter_colour(name))
        labels = [f"{100 * share:.0f}" if share >= 0.01 or not share else "<1" for share in shares]
        axes.bar_label(bars, [label if label != "0" else "" for label in labels], padding=2, fontsize=8)
        axes.set(xlim=(0.4, longest + 0.6), ylim=(0, 1.12 * highest), yticks=[], xticks=range(1, longest + 1))
        axes.set_xlabel("tokens from one step")
        axes.set_title("% of steps", loc="left", color=MUTED, fontsize=9)
        axes.tick_params(length=0)

    return _render(f"accepted_histogram-{name}", f"{name}: {mean:.2f} tokens per step on average", (3.3, 2.4), draw)


def speed_bars(plain: float, drafters: Mapping[str, Mapping[str, Any]], *, narrow: bool = False) -> Markup:
    """Tokens per second: plain decoding above, then every drafter with its speed-up.

    Args:
        plain: of plain decoding.
        drafters: `speculative_tokens_per_second` and `speedup` of each.
        narrow: for small screens.
    """
    names = ["plain", *drafters]
    rates = [plain, *(each["speculative_tokens_per_second"] for each in drafters.values())]
    unit, room = ("/s", 1.75) if narrow else (" tokens/s", 1.36)
    factors = ["", *(f", {each['speedup']:.2f}×" for each in drafters.values())]  # noqa: RUF001

    def draw(axes: "Axes") -> None:
        colours = [MUTED, *(drafter_colour(name) for name in drafters)]
        bars = axes.barh(range(len(names)), rates, height=0.62, color=colours)
        for bar, rate, factor in zip(bars, rates, factors, strict=True):
            place = (bar.get_width(), bar.get_y() + bar.get_height() / 2)
            text = f"{rate:,.0f}{unit}{factor}"
            axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", weight="bold")
        axes.set(xlim=(0, room * max(rates)), ylim=(len(names) - 0.5, -0.5), xticks=[])
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.spines["bottom"].set_visible(False)
        axes.axvline(plain, color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))

    size = (3.5, 0.2 + 0.36 * len(names)) if narrow else (7.4, 0.3 + 0.48 * len(names))
    return _render(f"speed{'-narrow' if narrow else ''}", "Tokens per second, plain and with every drafter", size, draw)


def tree_drawing(drafter: str, tree: DraftTree) -> Markup:
    """The draft tree from left to right, a column for each depth, a circle for each guess with its rank in it."""
    paths = ((), *tree.paths)
    rows = _rows(tree)
    height = max(rows) + 1

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        bend = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        for node, parent in enumerate(tree.parents[1:], 1):
            x, y, end = len(paths[parent]), rows[parent], rows[node]
            curve = Path([(x, y), (x + 0.5, y), (x + 0.5, end), (x + 1, end)], bend)
            axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=MUTED, linewidth=1))
        for path, row in zip(paths, rows, strict=True):
            colour, text = _node_look(drafter, path)
            axes.plot(len(path), row, marker="o", markersize=17, color=colour, markeredgecolor=SURFACE)
            axes.text(len(path), row, text, ha="center", va="center_baseline", color=SURFACE, weight="bold")
        for depth in range(1, tree.depth + 1):
            axes.text(depth, -0.85, f"+{depth}", ha="center", va="center", color=MUTED)
        axes.set(xlim=(-0.3, tree.depth + 0.3), ylim=(height - 0.5, -1.15))
        axes.axis("off")

    size = (0.8 * (tree.depth + 0.6), 0.36 * (height + 0.65))
    return _render("tree", f"Draft tree with {len(tree.paths)} guesses, {tree.depth} deep", size, draw)


def _rows(tree: DraftTree) -> list[int]:
    """The row of every node: leaves take one each in order of ranks, and each parent stands beside its first child."""
    paths = ((), *tree.paths)
    leaves = sorted(path for path in paths if not any(other[:-1] == path for other in paths if other))
    return [next(row for row, leaf in enumerate(leaves) if leaf[: len(path)] == path) for path in paths]


def _node_look(drafter: str, path: tuple[int, ...]) -> tuple[str, str]:
    """Colour and text of a node."""
    if not path:
        return MUTED, ""
    if is_ngram_guess(drafter, path):
        return DRAFTER_COLOURS["ngram"], "n"
    return DRAFTER_COLOURS["medusa"], str(path[-1] + 1)


def is_ngram_guess(drafter: str, path: Sequence[int]) -> bool:
    """True if a node's guess comes from the n-gram drafter, whose ranks follow those of the heads."""
    return drafter == "ngram" or ("ngram" in drafter and path[-1] >= HEAD_WIDTH)


def drafter_colour(name: str) -> str:
    """A drafter's colour in all charts."""
    return DRAFTER_COLOURS.get(name, GREEN)


def _render(name: str, label: str, size: tuple[float, float], draw: Callable[["Axes"], None]) -> Markup:
    """Draws one figure; `name` tells its ids from those of other SVGs in the page, `label` is read aloud."""
    # Imported here because it takes its time, and only reports need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        out = StringIO()
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    return _inline(out.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> Markup:
    """Fits an SVG file into a page: unique ids, the page's colours and font, no prolog or style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _ID.sub(rf"\g<1>{re.sub(r'[^a-z]', '-', name)}-", svg)
    svg = _FONT.sub("", svg)
    for stand_in, colour in _CSS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1).strip())
