"""Helpers of notebooks: a small model to try things on, coloured drafts, pictures of draft trees, reports.

Pictures need matplotlib, and all but `small_model` the IPython that notebooks run in.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from flax import nnx

from lin_jax import api
from lin_jax.attention import AttentionConfig
from lin_jax.data import Corpus, Tokenizer, prepare_tokenizer
from lin_jax.decoding import Generation, TokenOrigin
from lin_jax.decoding.streamed_text import StreamedText
from lin_jax.decoding.trace import TracedStep
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.rotary import RotaryConfig
from lin_jax.recipe import Text, text_data
from lin_jax.report.figures import QualityReport
from lin_jax.report.pages import markdown, positions_figure
from lin_jax.session import Session

# Learning rate as a multiple of that which `train` gives a model that has learnt much already.
_FROM_SCRATCH = 4.0
# Tokens that the small model's folder says its texts have at most.
_POSITIONS = 2048
_ACCEPTED, _REJECTED, _ROOT = "#bfe3c0", "#e5e7eb", "#bfdbfe"
_EDGE, _FAINT = "#15803d", "#9ca3af"


def small_model(
    folder: str | Path,
    text: Text = "python-stdlib",
    *,
    attention: str | AttentionConfig | Sequence[Any] = "softmax",
    steps: int = 300,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    vocab_size: int = 1024,
    max_bytes: int | None = 4_000_000,
    batch_size: int = 8,
    sequence_length: int = 128,
) -> tuple[Any, Tokenizer]:
    """Trains a small LLaMA from nothing, in about a minute on two cores; called again, it loads what is finished.

    Args:
        folder: where it is kept; an interrupted call goes on from there.
        text: text, as in `train`; by default the sources of Python's standard library.
        attention: its attention.
        steps: optimizer steps.
        hidden_size: width.
        num_layers: layers.
        num_heads: heads.
        vocab_size: entries of the tokenizer that is trained on the text.
        max_bytes: of the text at the most; None takes all.
        batch_size: rows of a step.
        sequence_length: tokens of a row.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: the folder holds another model, or there is no text.
        KeyboardInterrupt: after Ctrl-C; call it again to go on.
    """
    data = replace(text_data(text, None, sequence_length), vocab_size=vocab_size, max_bytes=max_bytes)
    tokenizer = prepare_tokenizer(data, Corpus.open(data))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        # That of LLaMA, in round numbers.
        intermediate_size=-(-8 * hidden_size // 3 // 32) * 32,
        num_layers=num_layers,
        num_heads=num_heads,
        # Said here, since the finished folder, which this is compared with when it is called again, says them.
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        attention=AttentionConfig.of(attention),
        # Written into the folder that training begins from, and read from there when this is called again.
        rotary=RotaryConfig(context_length=_POSITIONS),
    )
    blank = Llama(config, rngs=nnx.Rngs(0))
    trained = api.train(
        blank, tokenizer, data, steps=steps, output=folder, batch_size=batch_size, learning_rate=_FROM_SCRATCH
    )
    return trained, tokenizer


def coloured_text(session: Session, prompt: Sequence[int], generation: Generation, row: int = 0) -> Any:
    """Shows a generated text in which tokens from accepted drafts are coloured.

    Args:
        session: of the model.
        prompt: token ids of the prompt.
        generation: what came out.
        row: number of the prompt, from 0.
    """
    return _display().HTML(_coloured_html(session, prompt, generation, row))


def tree_picture(session: Session, step: TracedStep) -> Any:
    """Draws the draft tree of a step: the accepted path is green, other guesses are grey, the root is blue.

    Args:
        session: of the model.
        step: a step of `decoding.trace.traced_steps`.
    """
    return image_of(tree_figure(step, lambda token: session.decode([token])))


def tree_figure(step: TracedStep, text_of: Any) -> Any:
    """The draft tree of a step as a figure of matplotlib's; places without a guess are left out.

    Args:
        step: the step.
        text_of: text of a token.
    """
    from matplotlib.figure import Figure

    depth, row = _places(step)
    height = max(1.2, 0.42 * (max(row.values()) + 1) + 0.4)
    figure = Figure(figsize=(1.4 + 1.5 * max(depth.values()), height), layout="constrained")
    axes = figure.subplots()
    for node in row:
        on_path = node in step.accepted
        if (parent := step.parents[node]) >= 0:
            style: dict[str, Any] = {"color": _EDGE, "lw": 2} if on_path else {"color": _FAINT, "lw": 0.8}
            axes.plot([depth[parent], depth[node]], [row[parent], row[node]], zorder=0, **style)
        colour = _ROOT if node == 0 else _ACCEPTED if on_path else _REJECTED
        axes.text(
            depth[node],
            row[node],
            _shown(text_of(step.tokens[node])),
            ha="center",
            va="center",
            family="monospace",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "none"},
        )
    axes.set_xlim(-0.5, max(depth.values()) + 0.5)
    axes.set_ylim(max(row.values()) + 0.6, -0.6)
    axes.axis("off")
    return figure


def show_report(report: QualityReport) -> None:
    """Shows the tables of a report and, where there is matplotlib, its picture."""
    display = _display()
    # Its headings are below those of the notebook.
    display.display(display.Markdown(re.sub("^#", "###", markdown(report), flags=re.MULTILINE)))
    try:
        figure = positions_figure(report)
    except UserError:
        return
    display.display(image_of(figure))


def image_of(figure: Any) -> Any:
    """A figure of matplotlib's as an image, whatever backend the notebook has."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return _display().Image(data=content.getvalue(), format="png")


def _coloured_html(session: Session, prompt: Sequence[int], generation: Generation, row: int) -> str:
    pairs = zip(generation.tokens[row], generation.origins[row], strict=True)
    stream, parts = StreamedText(session.tokenizer, (), prompt), []
    # Tokens of one origin together, as a character may be made of several.
    for origin, run in groupby(pairs, key=lambda pair: pair[1]):
        text = escape(stream.push([token for token, _ in run]))
        parts.append(f'<mark style="background:{_ACCEPTED}">{text}</mark>' if origin == TokenOrigin.DRAFT else text)
    parts.append(escape(stream.flush()))
    text = f"<b>{escape(session.decode(prompt))}</b>{''.join(parts)}"
    return f'<pre style="white-space:pre-wrap;font-family:monospace">{text}</pre>'


def _places(step: TracedStep) -> tuple[dict[int, int], dict[int, int]]:
    """Depth, and row of the picture, of every node that holds a guess: children below each other, parents beside."""
    depth: dict[int, int] = {}
    for node, parent in enumerate(step.parents):
        if node == 0 or (parent in depth and step.tokens[node] >= 0):
            depth[node] = 0 if node == 0 else depth[parent] + 1
    row: dict[int, int] = {}
    rows = 0

    def place(node: int) -> None:
        nonlocal rows
        children = [other for other in depth if other and step.parents[other] == node]
        row[node] = rows
        for number, child in enumerate(children):
            rows += number > 0
            place(child)

    place(0)
    return depth, row


def _shown(text: str) -> str:
    """A token as a picture can show it: white space and dollars are marks there."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7").replace("$", r"\$") or "\u2205"


def _display() -> Any:
    try:
        import IPython.display
    except ImportError as error:
        raise UserError("there is no IPython; open this in a notebook, or pip install ipykernel") from error
    return IPython.display
