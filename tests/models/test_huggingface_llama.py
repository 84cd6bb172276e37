"""LLaMA, Mistral and Qwen with softmax attention against transformers' own, in PyTorch: logits, loss, every gradient.

For float64, transformers runs with a `torch` in which single precision means double, since its norm, its frequencies
and its softmax name float32 outright. So its own formulas are what is compared, to 1e-9.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from support.cells import cells, some_of
from support.golden_files import assert_close
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, modeling_rope_utils
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from lin_jax.hub.families.llama import config_from_huggingface, read_llama, write_llama
from lin_jax.models import Llama
from lin_jax.models.params import abstract_model
from lin_jax.models.rotary import SCALINGS, rotary_table

LENGTH = 24
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": None},
    "grouped": {"head_dim": None, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "wide_heads": {"head_dim": 10, "num_key_value_heads": 2},
}
RELATIVES: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "num_key_value_heads": 2},
    "mistral": {"kind": "mistral", "sliding_window": None, "num_key_value_heads": 2},
    "qwen2": {"kind": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"kind": "qwen3", "num_key_value_heads": 2, "head_dim": 6},
    "mistral_window": {"kind": "mistral", "sliding_window": 5, "num_key_value_heads": 2},
    "qwen2_windows": {
        "kind": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3_types": {
        "kind": "qwen3",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def scaled(
    scaling: str, *, trained: int = 64, set_for: int | None = None, theta: float = 1000.0, **options: Any
) -> dict[str, Any]:
    """Options of transformers' configuration, and the length that ours is set for instead of the one it names."""
    rope = {"rope_type": scaling, "rope_theta": theta, **options}
    return {"max_position_embeddings": trained, "rope_parameters": rope, "set_for": set_for}


# Of the four frequencies of a head, some lie inside the bands of yarn and llama3, others on either side of them.
YARN = {"trained": 2048, "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 8.0, "beta_slow": 0.5}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 32,
}
ROTARY: dict[str, dict[str, Any]] = {
    "default": scaled("default", theta=500.0),
    "linear": scaled("linear", factor=3.0),
    "dynamic_at_home": scaled("dynamic", factor=3.0, trained=32),
    "dynamic_beyond": scaled("dynamic", factor=3.0, trained=14, set_for=LENGTH),
    "yarn": scaled("yarn", **YARN),
    "yarn_mscale": scaled("yarn", **YARN, mscale=0.7, mscale_all_dim=1.4, truncate=False),
    "yarn_one_mscale": scaled("yarn", **YARN, mscale=0.7),
    "yarn_not_truncated": scaled("yarn", **YARN, truncate=False),
    "yarn_given_factor": scaled("yarn", **YARN, attention_factor=0.8),
    "longrope_short": scaled("longrope", **LONG, set_for=32),
    "longrope_long": scaled("longrope", **LONG | {"original_max_position_embeddings": 16}),
    "longrope_factor": scaled("longrope", **LONG | {"original_max_position_embeddings": 16}, factor=8.0),
    "llama3": scaled("llama3", trained=512, **LLAMA3),
    "proportional": scaled("proportional", partial_rotary_factor=0.5),
}
# Those whose frequencies are compared, but not also logits and gradients: the same code with other numbers.
ALIKE = {
    "default",
    "dynamic_at_home",
    "yarn_one_mscale",
    "yarn_not_truncated",
    "yarn_given_factor",
    "longrope_factor",
}


class DoubleTorch:
    """PyTorch, but `float32` and `float` are double precision."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=cells(["float64"], ["float32"]))
def dtype(request: pytest.FixtureRequest, x64: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The type of both models; transformers calculates in it throughout."""
    if request.param == "float64":
        for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, modeling_rope_utils):
            monkeypatch.setattr(module, "torch", DoubleTorch())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_dtype(torch.float32)


def their_model(rotary: dict[str, Any] | None = None, kind: str = "llama", **sizes: Any) -> PreTrainedModel:
    """transformers' model with weights large enough for every part to matter."""
    rotary = {name: value for name, value in (rotary or {}).items() if name != "set_for"}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | rotary | sizes)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return model


def our_model(theirs: PreTrainedModel, dtype: str, set_for: int | None = None) -> Llama:
    """Ours with the same sizes and weights, and its frequencies set for another length if one is given."""
    config = config_from_huggingface(theirs.config.to_dict())
    rotary = config.rotary if set_for is None else replace(config.rotary, context_length=set_for)
    model = abstract_model(replace(config, rotary=rotary, dtype=dtype, param_dtype=dtype))
    read_llama(model, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    return model


def draw_tokens(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, LENGTH))


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions inside each document, by a loop; 0 in padding."""
    positions = np.zeros_like(segment_ids)
    for row, t in np.ndindex(*segment_ids.shape):
        if t and segment_ids[row, t] and segment_ids[row, t] == segment_ids[row, t - 1]:
            positions[row, t] = positions[row, t - 1] + 1
    return positions


Results = tuple[Any, Any, dict[str, np.ndarray]]


def their_results(model: PreTrainedModel, tokens: np.ndarray, segment_ids: np.ndarray | None) -> Results:
    """Logits, loss and gradients; a document's first token is nobody's target."""
    labels, options = torch.tensor(tokens), {}
    if segment_ids is not None:
        positions = positions_of(segment_ids)
        labels[torch.tensor(positions == 0)] = -100
        options["position_ids"] = torch.tensor(positions)
        if not segment_ids.all():  # Without a mask, transformers tells packed documents by their positions.
            options["attention_mask"] = torch.tensor(segment_ids > 0).long()
    outputs = model(torch.tensor(tokens), labels=labels, use_cache=False, **options)
    outputs.loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return outputs.logits.detach().numpy(), outputs.loss.item(), gradients


# Compilation is what takes time here, so the compiler is told to optimise little.
@jax.jit
@nnx.value_and_grad(has_aux=True)
def loss_and_logits(model: Llama, tokens: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    where = None if segment_ids is None else (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return losses.mean(where=where), logits


def our_results(model: Llama, tokens: np.ndarray, segment_ids: np.ndarray | None) -> Results:
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    (loss, logits), gradients = loss_and_logits(model, jnp.asarray(tokens), segment_ids)
    return logits, loss, write_llama(gradients, model)


def assert_same(ours: Llama, theirs: PreTrainedModel, dtype: str, segment_ids: np.ndarray | None = None) -> None:
    tokens = draw_tokens(2)
    logits, loss, gradients = our_results(ours, tokens, segment_ids)
    their_logits, their_loss, their_gradients = their_results(theirs, tokens, segment_ids)
    real = np.s_[:] if segment_ids is None else segment_ids > 0
    assert logits.dtype == loss.dtype == dtype == str(their_logits.dtype)
    assert_close(logits[real], their_logits[real], dtype)
    assert_close(loss, np.asarray(their_loss), dtype)
    assert set(gradients) == set(their_gradients)
    for name, expected in their_gradients.items():
        assert_close(gradients[name], expected, dtype)


@pytest.mark.parametrize("name", some_of(ARCHITECTURES, ("grouped", "tied")))
def test_architectures(name: str, dtype: str) -> None:
    theirs = their_model(**ARCHITECTURES[name])
    assert_same(our_model(theirs, dtype), theirs, dtype)


@pytest.mark.parametrize("name", some_of(RELATIVES, ("biases", "qwen3", "mistral_window")))
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_relatives(name: str, dtype: str) -> None:
    """Biases, the options of Mistral, Qwen2 and Qwen3, and windows that rows are longer than."""
    theirs = their_model(**RELATIVES[name])
    assert_same(our_model(theirs, dtype), theirs, dtype)


@pytest.mark.parametrize("side", ["right", "left", "both", "packed"])
def test_padding_and_packing(side: str, dtype: str) -> None:
    """Padding on either side, where transformers is given the positions, and several documents in a row."""
    segment_ids = np.ones((2, LENGTH), int)
    if side == "right":
        segment_ids[0, -5:] = segment_ids[1, -11:] = 0
    elif side == "left":
        segment_ids[0, :5] = segment_ids[1, :11] = 0
    elif side == "both":
        segment_ids[0, -5:] = segment_ids[1, :11] = 0
    else:
        segment_ids[0, 7:] += 1
        segment_ids[1, 13:] += 1
        segment_ids[1, 20:] += 1
    theirs = their_model(**ARCHITECTURES["grouped"])
    assert_same(our_model(theirs, dtype), theirs, dtype, segment_ids)


@pytest.mark.parametrize(
    "name", some_of([name for name in ROTARY if name not in ALIKE], ("linear", "yarn", "longrope_long"))
)
def test_rotary_scalings(name: str, dtype: str) -> None:
    theirs = their_model(ROTARY[name])
    assert_same(our_model(theirs, dtype, ROTARY[name]["set_for"]), theirs, dtype)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_tables(name: str, dtype: str) -> None:
    theirs = their_model(ROTARY[name])
    config = our_model(theirs, dtype, ROTARY[name]["set_for"]).config
    positions = np.arange(LENGTH)[None]
    table = rotary_table(jnp.asarray(positions), config.head_size, config.rotary, jnp.dtype(dtype))
    expected = theirs.model.rotary_emb(torch.zeros(()), torch.tensor(positions))
    for part, both_halves in zip(table, expected, strict=True):
        assert part.dtype == dtype == both_halves.numpy().dtype
        assert_close(jnp.concatenate([part, part], axis=-1), both_halves.numpy(), dtype)


def test_every_scaling_is_compared() -> None:
    assert {options["rope_parameters"]["rope_type"] for options in ROTARY.values()} == set(SCALINGS)
    assert set(SCALINGS) == {"default", *modeling_rope_utils.ROPE_INIT_FUNCTIONS}
