"""End tokens on their way: from a folder through a run, training in memory and exports, all of them stay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from flax import nnx

import lin_jax
from lin_jax.cli.hub.options import main
from lin_jax.data import Tokenizer
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama
from lin_jax.session import Session
from lin_jax.training.model_source import ModelSource
from lin_jax.training.run import train

# The generation configuration's, config.json's, and the tokenizer's.
ENDS = (7, 5, 9, 0)


@pytest.fixture(scope="module")
def place(corpus: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([corpus.read_text()], 280)
    config = replace(tiny_model, num_layers=1, vocab_size=280, attention="softmax")
    folder = tmp_path_factory.mktemp("model") / "llama"
    save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder, tokenizer=tokenizer, source={"eos_token_id": 9})
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5], "temperature": 0.5}')
    return folder


def ends_of(folder: Path) -> tuple[int, ...]:
    """As transformers reads them."""
    found = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    return tuple(found) if isinstance(found, list) else (found,)


@pytest.mark.parametrize("from_path", [True, False])
def test_a_saved_folder(place: Path, tiny_model: Any, tmp_path: Path, from_path: bool) -> None:
    """Given as tokens, or in files that are copied."""
    tokenizer, source = ModelSource(place).tokenizer(), json.loads((place / "config.json").read_text())
    model = Llama(replace(tiny_model, num_layers=1, vocab_size=280, attention="softmax"), rngs=nnx.Rngs(0))
    if from_path:
        save_pretrained(model, tmp_path / "out", tokenizer=place, source=source)
    else:
        save_pretrained(model, tmp_path / "out", tokenizer=tokenizer, source=source, end_tokens=(7, 5))
    assert set(ends_of(tmp_path / "out")) == set(ENDS)
    assert set(ModelSource(tmp_path / "out").end_tokens(tokenizer)) == set(ENDS)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said.get("temperature") == (0.5 if from_path else None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 9


def test_an_imported_folder(place: Path, tmp_path: Path) -> None:
    assert main(["import", str(place), str(tmp_path / "out")]) == 0
    assert set(ends_of(tmp_path / "out")) == set(ENDS)


def test_a_run_and_what_is_exported_of_it(place: Path, tiny_run: Any, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", init_from=str(place), steps=1)
    train(replace(run, model=replace(run.model, attention="softmax")))
    assert Session.load(tmp_path / "run").end_tokens == ENDS
    # A run that begins from the run knows them still.
    after = tiny_run(tmp_path / "heads", init_from=str(tmp_path / "run"), objective="medusa", steps=1)
    train(after)
    assert main(["export", str(tmp_path / "heads"), str(tmp_path / "out")]) == 0
    assert set(ends_of(tmp_path / "out")) == set(ENDS)


@pytest.mark.thorough
def test_in_memory(place: Path, corpus: Path, tmp_path: Path) -> None:
    model, tokenizer = lin_jax.from_pretrained(place)
    options: dict[str, Any] = {"batch_size": 2, "sequence_length": 24, "steps": 1}
    lin_jax.save_pretrained(
        lin_jax.train(model, tokenizer, corpus, **options), tmp_path / "memory", tokenizer=tokenizer
    )
    lin_jax.train(model, tokenizer, corpus, output=tmp_path / "run", **options)
    assert set(ends_of(tmp_path / "memory")) == set(ENDS)
    assert ModelSource(tmp_path / "run" / "train").end_tokens(tokenizer) == ENDS
