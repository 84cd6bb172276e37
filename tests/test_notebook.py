"""The notebook, run cell by cell as a person would, with small settings; and some of its cells once more."""

import nbclient
import nbformat
from support.processes import ROOT

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
    assert any("image/png" in text for text in said)
    assert any("tokens a step" in text for text in said)
    assert (tmp_path / "out" / "export" / "config.json").exists()
