"""Exported encoders in plain transformers: the same logits, with padding on either side and several lengths."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from support.cells import cells
from support.exported import SMALL, code_folder, one_thread, random_model  # noqa: F401 - fixtures
from support.golden_files import assert_close

from lin_jax.attention import AttentionConfig
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models.bert import Bert, BertClassifier, BertConfig, BertMaskedLM

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
LENGTH = 14
CASES = [
    "augmented",
    "linformer+local+convolution",
    "yoso+convolution",
    "transnormer",
    "square",
    "exponential+window",
]
THOROUGH = [
    "flash_local",
    "flash+convolution",
    "linear_angular",
    "performer+local",
    "rfa",
    "relu",
    "elu+local+convolution",
    "hedgehog",
    "softmax+convolution",
    "hedgehog+window+convolution",
]
AUTOMATIC = {
    BertMaskedLM: "AutoModelForMaskedLM",
    BertClassifier: "AutoModelForSequenceClassification",
    Bert: "AutoModel",
}


def encoder(name: str, kind: type = BertMaskedLM, dtype: str = "float64", **sizes: Any) -> Any:
    attention = AttentionConfig(name, **SMALL | sizes)
    types = {"dtype": dtype, "param_dtype": dtype}
    config = BertConfig(**SIZES, **types, attention=attention, max_positions=20, num_labels=3)
    return random_model(lambda: kind(config, rngs=nnx.Rngs(0)))


def rows() -> dict[str, np.ndarray]:
    """Rows with padding behind, in front and nowhere, and kinds of tokens."""
    draw, places = np.random.default_rng(0), np.arange(LENGTH)
    return {
        "tokens": draw.integers(0, 23, (3, LENGTH)),
        "mask": np.stack([places < 9, places >= 5, places >= 0]),
        "types": (places > 6)[None].repeat(3, 0),
    }


def theirs(kind: type, folder: Path) -> Any:
    automatic = getattr(transformers, AUTOMATIC[kind])
    return automatic.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()


def outputs(model: Any, batch: dict[str, np.ndarray]) -> Any:
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    with torch.no_grad():
        return model(**{names[name]: torch.tensor(part).long() for name, part in batch.items()})


@pytest.mark.parametrize("name", cells(CASES, THOROUGH))
def test_same_logits(name: str, tmp_path: Path, x64: None) -> None:
    ours, batch = encoder(name), rows()
    folder = save_pretrained(ours, tmp_path / "model")
    expected = np.asarray(ours(*(jnp.asarray(part.astype(np.int32)) for part in batch.values())))
    found = outputs(theirs(BertMaskedLM, folder), batch).logits.numpy()
    assert np.abs(found - expected)[batch["mask"]].max() < 1e-9
    assert_close(found[batch["mask"]], expected[batch["mask"]], "float64")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("exponential+window", {"window": 3}),
        ("exponential+window", {"window_groups": 0}),
        ("exponential+window", {"window": 2, "sinks": 3}),
        ("relu+convolution", {"convolve_padding": True}),
    ],
    ids=str,
)
def test_other_sizes(name: str, sizes: dict[str, Any], tmp_path: Path, x64: None) -> None:
    """Windows on both sides, and a convolution that reads what is not there."""
    ours, batch = encoder(name, **sizes), rows()
    folder = save_pretrained(ours, tmp_path / "model")
    expected = np.asarray(ours(*(jnp.asarray(part.astype(np.int32)) for part in batch.values())))
    found = outputs(theirs(BertMaskedLM, folder), batch).logits.numpy()
    assert np.abs(found - expected)[batch["mask"]].max() < 1e-9


@pytest.mark.parametrize("kind", [BertClassifier, Bert])
def test_other_heads(kind: type, tmp_path: Path, x64: None) -> None:
    """A classifier and an encoder alone, by their automatic classes; and both in JAX again."""
    ours, batch = encoder("augmented", kind), rows()
    folder = save_pretrained(ours, tmp_path / "model")
    arrays = [jnp.asarray(part.astype(np.int32)) for part in batch.values()]
    found = outputs(theirs(kind, folder), batch)
    expected, value = (ours.pooled(*arrays), found.get("pooler_output")) if kind is Bert else (ours(*arrays), found[0])
    # The first token of a row that begins with padding is nothing that anybody reads.
    assert np.abs(value.numpy() - np.asarray(expected))[batch["mask"][:, 0]].max() < 1e-9
    again = from_pretrained(folder)
    assert type(again) is kind
    assert again.config == ours.config
    card = (folder / "README.md").read_text()
    assert f'{AUTOMATIC[kind]}.from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "speculative" not in card


def test_losses_and_saving_again(tmp_path: Path) -> None:
    """A model that was trained in PyTorch is saved by transformers, and opens in JAX."""
    folder = save_pretrained(encoder("performer+local", BertClassifier, "float32"), tmp_path / "model")
    model = theirs(BertClassifier, folder).float()
    tokens, labels = torch.tensor(rows()["tokens"]), torch.tensor([0, 2, 1])
    assert model(tokens).loss is None
    loss = model(tokens, labels=labels).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy(model(tokens).logits, labels)
    assert abs((loss - expected).item()) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path / "trained")
    again = from_pretrained(tmp_path / "trained")
    expected = model(tokens).logits.detach().numpy()
    assert_close(np.asarray(again(jnp.asarray(tokens.numpy().astype(np.int32)))), expected, "float32")
