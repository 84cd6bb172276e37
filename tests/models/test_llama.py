"""The LLaMA around its token mixers: packing, the loop over layers, types of numbers, and sizes that do not fit."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.cells import some_of

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig, RotaryConfig
from lin_jax.models.params import abstract_model
from lin_jax.models.rotary import rotary_table, rotate

VOCABULARY = 19
SINGLE = {"dtype": "float32", "param_dtype": "float32"}
ATTENTIONS = ("augmented", "softmax")


def config(attention: str, **options: Any) -> LlamaConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3}
    heads = {"num_heads": 4, "num_kv_heads": 2}
    types = {"dtype": "float64", "param_dtype": "float64"}
    return LlamaConfig(**sizes | heads | types | options, attention=AttentionConfig(attention, 4, 7))


def random_model(config: LlamaConfig) -> Llama:
    """Every parameter random and large enough to matter, also those that begin as constants."""
    model, rng = abstract_model(config), np.random.default_rng(1)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        values = (path[-1] == "scale") + rng.normal(scale=0.3, size=leaf.shape)
        leaf.set_value(jnp.asarray(values, leaf.dtype))
    nnx.update(model, state)
    return model


def draw_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, VOCABULARY, shape)


def loss_sum(model: Llama, tokens: jax.Array, segment_ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The sum of the next tokens' cross entropies inside documents, and the logits."""
    logits = model(tokens, segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    where = None if segment_ids is None else (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return losses.sum(where=where), logits


@jax.jit
@nnx.value_and_grad(has_aux=True)
def packed_loss(model: Llama, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return loss_sum(model, tokens, segment_ids)


@jax.jit
@nnx.value_and_grad(has_aux=True)
def separate_loss(model: Llama, batches: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    losses, logits = zip(*(loss_sum(model, tokens) for tokens in batches), strict=True)
    return sum(losses), list(logits)


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize("attention", some_of(ATTENTIONS, 1))
def test_packed_documents_are_separate_documents(attention: str, x64: None) -> None:
    """Logits and gradients of rows that hold several documents and padding, against each document as a row."""
    short, long = 9, 14
    starts = {(0, 2): short, (0, 11): long, (1, 0): long, (1, 14): short, (2, 0): short, (2, 9): short}
    tokens = draw_tokens(3, 27)
    segment_ids = np.zeros_like(tokens)
    for number, ((row, start), length) in enumerate(starts.items(), start=1):
        segment_ids[row, start : start + length] = number
    slices = {
        length: [np.s_[row, start : start + length] for (row, start), size in starts.items() if size == length]
        for length in (short, long)
    }

    model = random_model(config(attention))
    (loss, logits), gradients = packed_loss(model, jnp.asarray(tokens), jnp.asarray(segment_ids))
    batches = [jnp.asarray([tokens[where] for where in found]) for found in slices.values()]
    (expected_loss, expected_logits), expected_gradients = separate_loss(model, batches)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    for found, expected in zip(slices.values(), expected_logits, strict=True):
        assert_trees_close(jnp.stack([logits[where] for where in found]), expected, 1e-10)
    assert_trees_close(nnx.to_pure_dict(gradients), nnx.to_pure_dict(expected_gradients), 1e-10)


@pytest.mark.parametrize("attention", some_of(ATTENTIONS, 1))
@pytest.mark.thorough
def test_remat_and_unroll_change_nothing(attention: str, x64: None) -> None:
    tokens, segment_ids = jnp.asarray(draw_tokens(1, 11)), jnp.asarray([[1] * 6 + [2] * 5])
    results = []
    for remat, unroll in ((False, 1), (True, 1), (False, 3)):
        model = random_model(config(attention, remat=remat, unroll=unroll))
        result, gradients = packed_loss(model, tokens, segment_ids)
        results.append((result, nnx.to_pure_dict(gradients)))
    for other in results[1:]:
        assert_trees_close(other, results[0], 1e-12)


@pytest.mark.parametrize("attention", some_of(ATTENTIONS, 1))
@pytest.mark.thorough
def test_bfloat16_activations(attention: str) -> None:
    """Parameters, memory, logits and gradients stay float32; the numbers stay near those of float32."""
    tokens, lengths = jnp.asarray(draw_tokens(2, 13)), jnp.asarray([13, 10])

    @jax.jit
    def run(model: Llama) -> tuple[jax.Array, Any, Any]:
        (_, logits), gradients = nnx.value_and_grad(loss_sum, has_aux=True)(model, tokens)
        _, state = model.prefill(tokens, lengths, model.init_state(2, 16))
        return logits, nnx.to_pure_dict(gradients), state

    wide = config(attention, num_layers=2, **SINGLE)
    expected, expected_gradients, _ = run(random_model(wide))
    logits, gradients, state = run(random_model(replace(wide, dtype="bfloat16")))
    assert logits.dtype == jnp.float32
    assert state.keys.dtype == state.values.dtype == jnp.bfloat16
    if attention == "augmented":
        assert state.memory.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(state.memory)))
    assert far(logits, expected) < 0.03
    for found, near in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert found.dtype == jnp.float32
        assert far(found, near) < 0.1


def far(found: jax.Array, expected: jax.Array) -> float:
    """The norm of the difference, relative to that of what is expected; not a number if anything found is not."""
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_gradient_of_a_rotation_is_its_adjoint(x64: None) -> None:
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(0, 50, (2, 5)))
    table = rotary_table(positions, 6, RotaryConfig(), jnp.dtype("float64"))
    at, along, weights = (jnp.asarray(rng.standard_normal((2, 5, 3, 6))) for _ in range(3))
    gradient = jax.grad(lambda vectors: jnp.sum(weights * rotate(vectors, table)))(at)
    np.testing.assert_allclose(jnp.sum(gradient * along), jnp.sum(weights * rotate(along, table)), rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(gradient**2), jnp.sum(weights**2), rtol=1e-12)


def test_divisors_for_another_head_size() -> None:
    rotary = RotaryConfig(scaling="longrope", short_factor=(1.0,), long_factor=(1.0,))
    with pytest.raises(UserError, match=r"^rotary\.short_factor has 1 numbers; a head of size 8 needs 4$"):
        rotary_table(jnp.zeros((1, 1), int), 8, rotary, jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("model", "attention", "message"),
    [
        ({"num_kv_heads": 3}, {}, "model.num_kv_heads 3 does not divide model.num_heads 4"),
        ({"num_heads": 3, "num_kv_heads": 1}, {}, "model.hidden_size 16 is not a multiple of model.num_heads 3"),
        ({"head_dim": 5}, {}, "model.head_dim is 5"),
        ({"num_heads": 16}, {}, "model.head_dim is 1"),
        ({"dtype": "float16"}, {}, "model.dtype 'float16' is unknown"),
        ({"param_dtype": "double"}, {}, "model.param_dtype 'double' is unknown"),
        ({"vocab_size": None}, {}, "model.vocab_size is not set"),
        ({}, {"name": "retnet"}, "attention.name 'retnet' is unknown"),
        ({}, {"local_score": "exp"}, "attention.local_score 'exp' is unknown"),
        ({}, {"kernel_size": 4}, "attention.kernel_size is 4"),
        ({}, {"group_size": 0}, "attention.group_size is 0"),
        ({}, {"implementation": "cuda"}, "attention.implementation is 'cuda'; choose one of xla, tpu, tpu_interpreted"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(model: dict[str, Any], attention: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        abstract_model(replace(config("softmax", **SINGLE | model), attention=AttentionConfig(**attention)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
