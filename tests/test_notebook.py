"""The notebooks, run cell by cell as a person would, with small settings; and some of their cells once more."""

from dataclasses import replace

import nbclient
import nbformat
import numpy as np
import pytest
from flax import nnx
from support.processes import ROOT

from lin_jax.data import Tokenizer
from lin_jax.decoding import Generation, TokenOrigin
from lin_jax.decoding.trace import TracedStep
from lin_jax.models import Llama
from lin_jax.notebook import coloured_text, tree_figure
from lin_jax.session import Session

SMALL = """
from pathlib import Path

MODEL, TOKENIZER, TEXT, STEPS = None, None, {text!r}, 2
OUTPUT = Path({output!r})
OPTIONS = {{"batch_size": 2, "sequence_length": 32}}
"""


def outputs_of(cell):
    return "".join(str(each.get("text") or each.get("data")) for each in cell.outputs)


def test_quickstart(corpus, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not any(cell.outputs for cell in cells.values())
    first = next(cell for cell in cells.values() if "parameters" in cell.metadata.get("tags", []))
    first.source = SMALL.format(text=str(corpus), output=str(tmp_path / "out"))
    run = next(cell for cell in cells.values() if "configs/demo.yaml" in cell.source)
    tiny = '"--training.batch_size=2", "--data.sequence_length=32", "--data.vocab_size=280", "--model.num_layers=1"'
    run.source = run.source.replace('"configs/demo.yaml",', f'"configs/tiny.yaml", {tiny},')
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        for number, cell in enumerate(notebook.cells):
            # Whoever runs a cell again gets what is there.
            if "lin_jax.linearize" in cell.source or "save_pretrained" in cell.source:
                client.execute_cell(cell, number)
                assert "step 0" not in outputs_of(cell)
    said = [outputs_of(cell) for cell in cells.values()]
    # Notebooks show stderr in red: lines of progress are no errors.
    streams = [each for cell in cells.values() for each in cell.outputs if each.output_type == "stream"]
    assert "validation" in "".join(each.text for each in streams if each.name == "stdout")
    assert "validation" not in "".join(each.text for each in streams if each.name == "stderr")
    assert any("image/png" in text for text in said)
    assert any("tokens a step" in text for text in said)
    assert (tmp_path / "out" / "export" / "config.json").exists()


SMALL_MODEL = {
    "steps": 2,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 280,
    "batch_size": 2,
    "sequence_length": 32,
}
# Settings of each notebook beside those that all have, and words that some cell's output has.
NOTEBOOKS = {
    "linearize_your_own": (
        {"MODEL": None, "TOKENIZER": None, "STEPS": 2, "OPTIONS": {"batch_size": 2, "sequence_length": 32}},
        ("perplexity", "keep layer", "config.json", "image/png"),
    ),
    "look_inside": ({"MODEL": None, "GROUP": 8, "LENGTH": 24}, (".memory", "no convolution", "image/png")),
    "your_attention": ({}, ("token by token:", "tokens a step", "image/png")),
    "speculation_explained": (
        {"MODEL": None, "NEW_TOKENS": 24, "LENGTHS": (0, 3), "SIZES": (1, 4)},
        ("best on this machine:", "it gives", "text/html", "image/png"),
    ),
}


def read_notebook(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs_and_with_settings(name):
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    [settings] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    given = {"TEXT", "OUTPUT", "SMALL", *NOTEBOOKS[name][0]}
    assert given == {line.split(" = ")[0] for line in settings.source.splitlines()}


def test_notebooks_install_what_is_near(tmp_path, monkeypatch):
    """Each begins with the same cell: the working copy that it lies in, else a wheel beside it, else the name."""
    install = {
        next(cell.source for cell in read_notebook(name).cells if cell.cell_type == "code")
        for name in ("quickstart", *NOTEBOOKS)
    }
    [source] = install
    code = source.replace("%pip install --quiet ", "asked = f").replace('find_spec("lin_jax")', 'find_spec("no_such")')
    monkeypatch.chdir(tmp_path)

    def asked():
        names = {}
        exec(code, names)
        return names["asked"]

    assert asked() == "lin-jax[demo]"
    wheel = tmp_path / "lin_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert asked() == f"{wheel}[demo]"
    monkeypatch.chdir(ROOT / "notebooks")
    assert asked() == f"{ROOT}[demo]"


# Each costs a kernel, and the programs of a model.
@pytest.mark.thorough
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_to_their_ends(name, corpus, tmp_path):
    notebook = read_notebook(name)
    own, expected = NOTEBOOKS[name]
    settings = {"TEXT": str(corpus), "SMALL": SMALL_MODEL, **own}
    [cell] = [each for each in notebook.cells if "parameters" in each.metadata.get("tags", [])]
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    cell.source = "\n".join([*lines, f"OUTPUT = Path({str(tmp_path / 'out')!r})"])
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    said = "".join(outputs_of(each) for each in notebook.cells if each.cell_type == "code")
    for words in expected:
        assert words in said


def test_drafts_are_coloured_with_whole_characters(tiny_model):
    """A character of two tokens of one origin is whole, marks are escaped, and prompts are bold."""
    tokenizer = Tokenizer.train(["a"], 257)
    session = Session.of(Llama(replace(tiny_model, num_layers=1, vocab_size=257), rngs=nnx.Rngs(0)), tokenizer)
    tokens = tokenizer.encode("a<é").tolist()
    origins = [TokenOrigin.TARGET, TokenOrigin.TARGET, TokenOrigin.DRAFT, TokenOrigin.DRAFT]
    generation = Generation([tokens], [origins], None, ["length"], [1], np.ones(1, int), 1, 0, 0.0, 0.0, 0)
    shown = coloured_text(session, tokenizer.encode("b&").tolist(), generation).data
    assert "<b>b&amp;</b>a&lt;<mark" in shown
    assert ">é</mark></pre>" in shown


def test_a_tree_is_drawn_with_its_accepted_path():
    # Node 4 is a place without a guess, and what would be below it is left out, too.
    step = TracedStep((7, 1, 2, 3, -1, 5), (-1, 0, 0, 1, 1, 4), (0, 1, 3), (1, 3, 9))
    axes = tree_figure(step, lambda token: f"{token} $\n").axes[0]
    assert [text.get_text() for text in axes.texts] == [f"{token}\u00b7\\$\u21b5" for token in (7, 1, 3, 2)]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (2, 0), (1, 1)]
    assert sum(line.get_linewidth() > 1 for line in axes.lines) == 2
    assert len(axes.lines) == 3
