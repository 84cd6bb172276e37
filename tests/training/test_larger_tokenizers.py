"""Training and measuring from a folder whose tokenizer has an entry more than the embedding, as one for padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import lin_jax
from lin_jax.cli.evaluate import main as evaluate
from lin_jax.data import DataConfig, Document, Tokenizer, load_tokenizer
from lin_jax.data.tokens.tokenized import tokenized
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama
from lin_jax.training import load_model
from lin_jax.training.run import train
from lin_jax.training.setup import resolve

BEYOND = r"has the token '<pad>' of id 280, and the model knows 280; take it out of the text, or give the model a row"
OPTIONS: dict[str, Any] = {"batch_size": 2, "sequence_length": 24}


@pytest.fixture(scope="module")
def place(corpus: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([corpus.read_text()], 280)
    tokenizer.backend.add_special_tokens(["<pad>"])
    tokenizer = Tokenizer(tokenizer.backend, eos_token="<|endoftext|>", pad_token="<pad>")
    config = replace(tiny_model, num_layers=1, vocab_size=280, attention="softmax")
    return save_pretrained(
        Llama(config, rngs=nnx.Rngs(0)), tmp_path_factory.mktemp("model") / "llama", tokenizer=tokenizer
    )


def epoch(documents: list[Document], tokenizer: Tokenizer, data: DataConfig) -> list[np.ndarray]:
    """All tokens of some documents, as a run reads them."""
    found = tokenized(documents, tokenizer, data.cache)
    return [found[index]["tokens"] for index in range(len(found))]


@pytest.fixture(scope="module")
def marked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with the entry beyond in the middle."""
    text = corpus.read_text()
    file = tmp_path_factory.mktemp("text") / "marked.txt"
    file.write_text(f"{text[:2000]}<pad>{text[2000:4000]}")
    return file


def test_texts_without_the_entry_train(
    place: Path, tiny_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(tmp_path / "run", init_from=str(place), steps=2)
    run = replace(run, model=replace(run.model, attention="softmax"))
    assert train(run).status == 0
    assert "the tokenizer has 281 entries, the model 280: a text with one of those beyond is refused" in caplog.text
    assert load_model(tmp_path / "run")[0].config.vocab_size == 280
    assert load_tokenizer(tmp_path / "run" / "tokenizer").vocab_size == 281
    assert resolve(run, resume=True).config.model.vocab_size == 280


@pytest.mark.thorough
def test_texts_with_the_entry_are_refused(place: Path, marked: Path, tiny_run: Any, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", init_from=str(place), steps=60)
    run = replace(run, model=replace(run.model, attention="softmax"), data=replace(run.data, source=str(marked)))
    with pytest.raises(UserError, match=BEYOND):
        train(run)


def test_kept_tokens_of_a_larger_model(place: Path, marked: Path, tiny_run: Any, tmp_path: Path) -> None:
    """Tokens that another model, which has the row, left in the folder that keeps them."""
    data = replace(tiny_run("unused").data, cache=str(tmp_path))
    documents = [Document("marked", marked.read_text())]
    tokenizer = load_tokenizer(place)
    assert max(tokens.max() for tokens in epoch(documents, tokenizer, data)) == 280
    with pytest.raises(UserError, match=BEYOND):
        epoch(documents, tokenizer.within(280), data)


def test_in_memory(place: Path, corpus: Path, marked: Path) -> None:
    model, tokenizer = lin_jax.from_pretrained(place)
    assert lin_jax.train(model, tokenizer, corpus, steps=1, **OPTIONS).config.vocab_size == 280
    with pytest.raises(UserError, match=BEYOND):
        lin_jax.train(model, tokenizer, marked, steps=100, **OPTIONS)


def test_perplexity(place: Path, corpus: Path, marked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(place), "--text", str(corpus), "--batches", "1"]) == 0
    assert '"perplexity"' in capsys.readouterr().out
    with pytest.raises(UserError, match=BEYOND):
        evaluate([str(place), "--text", str(marked)])
