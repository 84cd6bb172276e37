"""The BERT against transformers' own in PyTorch: hidden and pooled vectors, logits, losses and every gradient."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from support.golden_files import assert_close

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.bert import config_from_huggingface, config_to_huggingface, entries, read_bert
from lin_jax.hub.tensors import named, uncovered
from lin_jax.models import Bert, BertClassifier, BertConfig, BertMaskedLM

VOCABULARY, LENGTH = 23, 11
LENGTHS = np.array([11, 5, 7])
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 13,
    "type_vocab_size": 3,
    "num_labels": 5,
    "attn_implementation": "eager",
}
MASK = np.arange(LENGTH) < LENGTHS[:, None]


@pytest.fixture
def double(x64: None) -> Iterator[None]:
    """Both models calculate in float64 throughout."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(limit: int, *shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, limit, shape)


def their_model(kind: Any) -> Any:
    """transformers' BERT with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return model


def our_model(kind: Any, theirs: Any, dtype: str = "float64") -> Any:
    config = replace(config_from_huggingface(theirs.config.to_dict()), dtype=dtype, param_dtype=dtype)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    read_bert(model, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    return model


@jax.jit
@nnx.value_and_grad(has_aux=True)
def loss_and_logits(
    model: Any, tokens: jax.Array, mask: jax.Array, types: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, mask, types)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return losses.mean(where=labels >= 0), logits


def masked_labels() -> np.ndarray:
    labels = draw(VOCABULARY, 3, LENGTH, seed=3)
    return np.where(MASK & (draw(3, 3, LENGTH, seed=4) > 0), labels, -100)


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        (BertMaskedLM, transformers.BertForMaskedLM, masked_labels()),
        (BertClassifier, transformers.BertForSequenceClassification, draw(5, 3)),
    ],
    ids=["masked", "classifier"],
)
def test_logits_loss_and_gradients(ours: Any, theirs: Any, labels: np.ndarray, double: None) -> None:
    theirs = their_model(theirs)
    ours = our_model(ours, theirs)
    inputs = draw(VOCABULARY, 3, LENGTH), MASK.astype(int), draw(3, 3, LENGTH)
    outputs = theirs(*map(torch.tensor, inputs), labels=torch.tensor(labels))
    outputs.loss.backward()
    (loss, logits), gradients = loss_and_logits(ours, *map(jnp.asarray, (*inputs, labels)))
    assert logits.dtype == loss.dtype == "float64"
    assert_close(logits, outputs.logits.detach().numpy(), "float64")
    assert_close(loss, np.asarray(outputs.loss.item()), "float64")
    found = named(gradients, entries(ours))
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, "float64")


@jax.jit
def embed(model: Bert, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden vectors, pooled ones, and sentence embeddings: means over present tokens, of length one."""
    hidden = model.hidden(tokens, mask)
    mean = jnp.mean(hidden, axis=1, where=mask[..., None])
    return hidden, model.pooled(tokens, mask), mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_embeddings(dtype: str, x64: None) -> None:
    theirs = their_model(transformers.BertModel).to(getattr(torch, dtype))
    tokens = draw(VOCABULARY, 3, LENGTH)
    with torch.no_grad():
        outputs = theirs(torch.tensor(tokens), attention_mask=torch.tensor(MASK).long())
    summed = (outputs.last_hidden_state * torch.tensor(MASK)[..., None]).sum(1) / torch.tensor(LENGTHS)[:, None]
    sentences = torch.nn.functional.normalize(summed, dim=-1)
    found = embed(our_model(Bert, theirs, dtype), jnp.asarray(tokens), jnp.asarray(MASK))
    for ours, expected in zip(found, (outputs.last_hidden_state, outputs.pooler_output, sentences), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, expected.numpy(), dtype)


def config(attention: str = "augmented", **options: Any) -> BertConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
    mixer = AttentionConfig(attention, 4, 5, features=6, rank=2)
    return BertConfig(**sizes | {"max_positions": 13, "attention": mixer} | options)


def random_model(config: BertConfig, kind: Any) -> Any:
    """Every parameter random and large enough to matter, also those that begin as constants."""
    model, rng = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))), np.random.default_rng(1)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        values = (path[-1] == "scale") + rng.normal(scale=0.5, size=leaf.shape)
        leaf.set_value(jnp.asarray(values, leaf.dtype))
    nnx.update(model, state)
    return model


@pytest.mark.parametrize("attention", ["augmented", "performer+local+convolution"])
def test_padding_is_not_read(attention: str, x64: None) -> None:
    """What padding holds changes nothing, and a row without its padding gives the same."""
    model = random_model(config(attention, dtype="float64", param_dtype="float64"), BertMaskedLM)
    run = jax.jit(lambda model, tokens, mask: model(tokens, mask))
    tokens = draw(VOCABULARY, 3, LENGTH)
    other = np.where(MASK, tokens, draw(VOCABULARY, 3, LENGTH, seed=9))
    logits = run(model, jnp.asarray(tokens), jnp.asarray(MASK))
    assert_close(run(model, jnp.asarray(other), jnp.asarray(MASK))[MASK], np.asarray(logits[MASK]), "float64")
    alone = run(model, jnp.asarray(tokens[1:2, : LENGTHS[1]]), None)
    assert_close(logits[1:2, : LENGTHS[1]], np.asarray(alone), "float64")


@pytest.mark.parametrize("kind", [Bert, BertMaskedLM, BertClassifier])
def test_names(kind: Any) -> None:
    """Everything goes out under a name and comes back, bit for bit."""
    model = random_model(config(), kind)
    table = entries(model)
    assert not uncovered(model, table)
    tensors = named(nnx.state(model), table)
    prefix = "" if kind is Bert else "bert."
    assert tensors[f"{prefix}encoder.layer.1.attention.self.dwconv.weight"].shape == (4, 1, 5, 1)
    copy = nnx.eval_shape(lambda: kind(model.config, rngs=nnx.Rngs(0)))
    read_bert(copy, tensors)
    for name, tensor in named(nnx.state(copy), table).items():
        assert np.array_equal(tensor, tensors[name])


def test_encoder_of_an_old_checkpoint_with_heads() -> None:
    """Gammas and betas, buffers and the heads of pretraining are no hindrance, with or without a pooler."""
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    } | {"bert.embeddings.position_ids": np.arange(13)}
    given = config_from_huggingface(SIZES)
    for pooler in (True, False):
        model = nnx.eval_shape(lambda pooler=pooler: Bert(given, pooler=pooler, rngs=nnx.Rngs(0)))
        read_bert(model, old)
        for name, tensor in named(nnx.state(model), entries(model)).items():
            assert np.array_equal(tensor, tensors[f"bert.{name}"])
    with pytest.raises(UserError, match="this BERT has no pooler"):
        model.pooled(jnp.zeros((1, 1), int))
    masked = nnx.eval_shape(lambda: BertMaskedLM(given, rngs=nnx.Rngs(0)))
    read_bert(masked, old)
    with pytest.raises(UserError, match=r"bert\.embeddings\.extra\.weight is unknown$"):
        read_bert(masked, old | {"bert.embeddings.extra.weight": np.zeros(1)})


def test_configurations() -> None:
    """As it stands in a file, as transformers rewrites it, and out and in again."""
    found = config_from_huggingface(SIZES)
    assert (found.num_heads, found.max_positions, found.types, found.num_labels) == (4, 13, 3, 5)
    assert found.attention == AttentionConfig("softmax")
    assert config_from_huggingface(transformers.BertConfig(**SIZES).to_dict()) == found
    out = config_to_huggingface(found)
    assert config_from_huggingface(out) == config_from_huggingface(transformers.BertConfig(**out).to_dict()) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not"),
        ({"is_decoder": True}, "is_decoder 'True' is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"num_attention_heads": 3}, "model.hidden_size 16 is not a multiple of model.num_heads 3"),
    ],
)
def test_refused_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_huggingface(SIZES | options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"^the configuration has no vocab_size; give"):
        config_from_huggingface({k: v for k, v in SIZES.items() if k != "vocab_size"})
    with pytest.raises(UserError, match=r"^model\.vocab_size is not set"):
        Bert(config(vocab_size=None), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"^model\.dtype 'float16' is unknown"):
        config(dtype="float16")
    model = random_model(config("softmax"), Bert)
    with pytest.raises(UserError, match=r"^a row has 14 tokens, the model has positions for 13; give"):
        model.hidden(jnp.zeros((1, 14), int))
