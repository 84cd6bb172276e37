"""Exported FLASHs in plain transformers: the same logits, states and greedy texts, with and without speculation."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support.cells import cells
from support.exported import SMALL, code_folder, one_thread, opened, random_model  # noqa: F401 - fixtures

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models import Flash, FlashConfig

SIZES = {"vocab_size": 23, "hidden_size": 12, "num_layers": 2, "query_key_size": 6, "relative_buckets": 8}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("flash+convolution", {}),
]
THOROUGH: list[tuple[str, dict[str, Any]]] = [
    ("augmented", {"norm": "layer", "shift_tokens": False}),
    ("exponential+window", {"window": 5, "decay": "token", "sinks": 2}),
    ("performer+local+convolution", {}),
    ("softmax+local", {}),
    ("flash_local", {"relative_max_distance": 9}),
    ("flash_global", {}),
    ("linear_angular", {"query_key_size": 40}),
    ("square+convolution", {}),
    ("linformer+local", {}),
    ("transnormer+convolution", {}),
    ("yoso+local", {}),
    ("relu", {"decay": "constant"}),
    ("elu+local", {}),
    ("hedgehog+window+convolution", {}),
    ("exponential+window", {"window": 4, "sinks": 2}),
    ("hedgehog", {}),
    ("exponential+local", {"decay": "token"}),
    ("rfa", {}),
]


def flash(name: str, **options: Any) -> Flash:
    sizes = {size: options.pop(size) for size in ("window", "decay", "sinks") if size in options}
    attention = AttentionConfig(name, **SMALL | sizes)
    config = FlashConfig(**SIZES | options, dtype="float64", param_dtype="float64", attention=attention)
    return random_model(lambda: Flash(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("name", "options"), cells(CASES, THOROUGH), ids=str)
def test_same_logits_and_texts(name: str, options: dict[str, Any], tmp_path: Path, x64: None) -> None:
    ours = flash(name, **options)
    folder = save_pretrained(ours, tmp_path / "model")
    theirs, draw = opened(folder), np.random.default_rng(0)
    tokens, real = draw.integers(0, 23, (2, 14)), np.arange(14) >= np.array([[0], [5]])
    expected = np.asarray(ours(jnp.asarray(tokens.astype(np.int32)), jnp.asarray(real.astype(np.int32))))
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real).long()}
    with torch.no_grad():
        found = theirs(**inputs).logits.numpy()
    assert np.abs(found - expected)[real].max() < 1e-9

    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = theirs.generate(**inputs, **greedy)[:, 14:].tolist()
    assert (
        texts
        == Generator(ours).generate([row[keep].tolist() for row, keep in zip(tokens, real, strict=True)], 12).tokens
    )
    # Without a mask, `generate` takes tokens 0 for padding.
    prompt = {name: part[:1] for name, part in inputs.items()}
    assert theirs.generate(**prompt, speculative=True, **greedy)[:, 14:].tolist() == texts[:1]
    assert from_pretrained(folder).config == ours.config
    # Where nothing is said, transformers 4 makes the head the embedding.
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_decoding_cannot_know_opens_here_only(tmp_path: Path, x64: None) -> None:
    """Scores that are divided by the length of the row."""
    folder = save_pretrained(flash("square", length_scale="row"), tmp_path / "model")
    assert "opens with `lin_jax` only" in (folder / "README.md").read_text()
    assert not list(folder.glob("*.py"))
