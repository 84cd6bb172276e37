"""GPT-2: transformers' own in PyTorch with softmax attention, and its forms with any."""

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
from support.model_forms import (
    assert_documents_are_apart,
    assert_drafts_change_nothing,
    assert_forms_agree,
    draw_tokens,
    forward,
    random_model,
)

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator
from lin_jax.errors import UserError
from lin_jax.hub.families.gpt2 import config_from_huggingface, config_to_huggingface, entries, ignored, read_gpt2
from lin_jax.hub.tensors import named
from lin_jax.models import Gpt2, Gpt2Classifier, Gpt2Config

VOCABULARY = 19
POSITIONS = 24
LENGTH = 13
THEIRS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "pad_token_id": 0,
    "num_labels": 3,
    "attn_implementation": "eager",
}
# Which tokens of two rows are real.
MASKS = {
    "none": None,
    "right": np.arange(LENGTH) < np.array([[LENGTH], [8]]),
    "left": np.arange(LENGTH) >= np.array([[0], [5]]),
}


def config(attention: str = "augmented", **options: Any) -> Gpt2Config:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_positions": POSITIONS}
    types = {"dtype": "float64", "param_dtype": "float64"}
    return Gpt2Config(**sizes | types | options, attention=AttentionConfig(attention, 4, 7))


def model(attention: str = "augmented", **options: Any) -> Gpt2:
    return random_model(lambda rngs: Gpt2(config(attention, **options), rngs=rngs))


def theirs(kind: type[torch.nn.Module], **options: Any) -> Any:
    """One of transformers' models with weights large enough for every part to matter."""
    torch.manual_seed(0)
    found = kind(transformers.GPT2Config(**THEIRS | options)).double().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return found


def filled(kind: type[Gpt2] | type[Gpt2Classifier], other: Any) -> Any:
    """Ours, with the configuration and the weights of one of theirs."""
    sizes = replace(config_from_huggingface(other.config.to_dict()), dtype="float64", param_dtype="float64")
    found = nnx.eval_shape(lambda: kind(sizes, rngs=nnx.Rngs(0)))
    read_gpt2(found, {name: tensor.numpy() for name, tensor in other.state_dict().items()})
    return found


@jax.jit
@nnx.value_and_grad(has_aux=True)
def value_and_grad(model: Gpt2, tokens: jax.Array, mask: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, mask=mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean(where=counted), logits


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 1e-3}])
def test_transformers_language_model(options: dict[str, Any], x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, loss and every gradient, by their names, without a mask and with padding on either side."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # transformers takes the loss in `float`.
    other = theirs(transformers.GPT2LMHeadModel, **options)
    own = filled(Gpt2, other)
    tokens = draw_tokens(2, LENGTH)
    for mask in MASKS.values():
        real = np.ones(tokens.shape, bool) if mask is None else mask
        counted = real[:, 1:] & real[:, :-1]
        labels = torch.from_numpy(np.where(np.pad(counted, ((0, 0), (1, 0))), tokens, -100))
        other.zero_grad()
        attention_mask = None if mask is None else torch.from_numpy(mask.astype(int))
        output = other(torch.from_numpy(tokens), attention_mask=attention_mask, labels=labels)
        output.loss.backward()

        (loss, logits), gradients = value_and_grad(own, *map(jnp.asarray, (tokens, real, counted)))
        assert_close(np.asarray(logits)[real], output.logits.detach().numpy()[real], "float64")
        assert_close(loss, output.loss.detach().numpy(), "float64")
        found = named(gradients, entries(own))
        expected = {name: parameter.grad.numpy() for name, parameter in other.named_parameters()}
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            assert_close(found[name], gradient, "float64")


@pytest.mark.parametrize("mask", MASKS)
def test_transformers_classifier(mask: str, x64: None) -> None:
    """Scores at the last token that is no padding."""
    other = theirs(transformers.GPT2ForSequenceClassification)
    own = filled(Gpt2Classifier, other)
    real = MASKS[mask]
    tokens = 1 + draw_tokens(2, LENGTH, vocabulary=VOCABULARY - 1)
    tokens = tokens if real is None else np.where(real, tokens, 0)
    attention_mask = None if real is None else torch.from_numpy(real.astype(int))
    expected = other(torch.from_numpy(tokens), attention_mask=attention_mask).logits
    logits = jax.jit(Gpt2Classifier.__call__)(own, tokens, real)
    assert_close(logits, expected.detach().numpy(), "float64")


def test_names_and_configurations_go_both_ways(x64: None) -> None:
    """transformers opens what is written; old buffers and names of the bare trunk are read."""
    for kind, architecture in ((Gpt2, "GPT2LMHeadModel"), (Gpt2Classifier, "GPT2ForSequenceClassification")):
        for tied in (True, False):
            sizes = config("softmax", tie_embeddings=tied, intermediate_size=40, num_labels=3)
            own = random_model(lambda rngs, kind=kind, sizes=sizes: kind(sizes, rngs=rngs))
            written = config_to_huggingface(sizes, architecture)
            back = config_from_huggingface(written, sizes.attention)
            assert replace(back, dtype="float64", param_dtype="float64") == sizes
            other = getattr(transformers, architecture)(transformers.GPT2Config.from_dict(written))
            tensors = named(nnx.state(own, nnx.Param), entries(own))
            absent, unknown = other.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
            assert unknown == []
            assert absent == (["lm_head.weight"] if kind is Gpt2 and tied else [])

    own = model("softmax")
    tensors = named(nnx.state(own, nnx.Param), entries(own))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    extra = ("h.0.attn.bias", "h.0.attn.masked_bias", "h.1.attn.dconv_ada2.weight")
    assert all(ignored(name) for name in extra)
    copy = nnx.eval_shape(lambda: Gpt2(own.config, rngs=nnx.Rngs(0)))
    read_gpt2(copy, bare | {name: np.ones(1) for name in extra} | {"lm_head.weight": bare["wte.weight"]})
    for name, tensor in named(nnx.state(copy, nnx.Param), entries(copy)).items():
        assert np.array_equal(tensor, tensors[name])
    with pytest.raises(UserError, match=r"^tensors do not fit the model: lm_head\.weight is unknown$"):
        read_gpt2(copy, tensors | {"lm_head.weight": bare["wte.weight"] + 1})


@pytest.mark.parametrize("attention", ["softmax", "augmented"])
def test_forms_agree(attention: str, x64: None) -> None:
    assert_forms_agree(model(attention))


@pytest.mark.thorough
def test_drafts_change_nothing_up_to_the_last_position(x64: None) -> None:
    """The longest text fills the positions; drafts reach beyond them."""
    own = model()
    assert_drafts_change_nothing(own, POSITIONS - 8)
    with pytest.raises(UserError) as caught:
        Generator(own).generate([[1] * 9], POSITIONS - 7)
    assert str(caught.value) == (
        "a prompt of 9 tokens and 17 new ones do not fit into the model's 24 positions; "
        "shorten the prompt, or ask for fewer tokens"
    )


def test_documents_are_apart(x64: None) -> None:
    """Positions count inside each document, so padding on the left is as good as on the right."""
    assert_documents_are_apart(model())


def test_masked_tokens_are_not_seen(x64: None) -> None:
    """Outputs at real tokens are those of the row without its padding, also where the padding comes first in the row.

    With the mask, positions count the whole row; the published code pays no heed to the mask of linear attention.
    """
    own, tokens = model(), draw_tokens(2, LENGTH)
    real = np.asarray(MASKS["right"])
    logits = np.asarray(forward(own, jnp.asarray(tokens), mask=jnp.asarray(real)))
    alone = forward(own, jnp.asarray(tokens[:, :8]))
    np.testing.assert_allclose(logits[:, :8], alone, rtol=1e-9, atol=1e-9)
    for other in (np.asarray(MASKS["left"]), np.arange(LENGTH) % 5 != np.array([[2], [3]])):
        results = [
            np.asarray(forward(own, jnp.asarray(np.where(other, tokens, filler)), mask=jnp.asarray(other)))
            for filler in (0, 7)
        ]
        assert np.array_equal(results[0][other], results[1][other])


def test_bfloat16_activations() -> None:
    """Logits stay float32 and near those of float32."""
    wide, tokens = model(dtype="float32", param_dtype="float32"), jnp.asarray(draw_tokens(2, LENGTH))
    narrow = model(dtype="bfloat16", param_dtype="float32")
    found, expected = forward(narrow, tokens), forward(wide, tokens)
    assert found.dtype == jnp.float32
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "model.hidden_size 16 is not a multiple of model.num_heads 3"),
        ({"max_positions": 0}, "model.max_positions is 0"),
        ({"dtype": "float16"}, "model.dtype 'float16' is unknown"),
        ({"vocab_size": None}, "model.vocab_size is not set"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        nnx.eval_shape(lambda: Gpt2(config(**options), rngs=nnx.Rngs(0)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_positions() -> None:
    own = model(dtype="float32", param_dtype="float32")
    message = r"^rows have 25 tokens, the model has 24 positions; give shorter rows, or raise model\.max_positions$"
    with pytest.raises(UserError, match=message):
        own(jnp.zeros((1, POSITIONS + 1), int))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n_layer": None}, "the configuration has no n_layer; give the config.json of a GPT-2"),
        (
            {"activation_function": "gelu"},
            "activation_function 'gelu' is not supported in a GPT-2; only gelu_new and gelu_pytorch_tanh are",
        ),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True in the configuration; only a GPT-2 with False is supported",
        ),
    ],
)
def test_configurations_that_are_no_such_model(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_huggingface({name: value for name, value in (THEIRS | option).items() if value is not None})
    assert str(caught.value) == message
