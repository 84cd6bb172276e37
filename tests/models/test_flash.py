"""FLASH around its token mixers: the token shift in every form, encoders, names, and sizes that do not fit.

Its mathematics is checked against the published numbers in `test_golden.py`.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import some_of
from support.model_forms import (
    assert_documents_are_apart,
    assert_drafts_change_nothing,
    assert_forms_agree,
    draw_tokens,
    forward,
    random_model,
)

from lin_jax.attention import REGISTRY, AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.flash import config_from_huggingface, config_to_huggingface, entries, ignored, read_flash
from lin_jax.hub.tensors import named, uncovered
from lin_jax.models import Flash, FlashConfig, FlashEncoder

SINGLE = {"dtype": "float32", "param_dtype": "float32"}


def config(attention: str = "augmented", **options: Any) -> FlashConfig:
    sizes = {"vocab_size": 19, "hidden_size": 14, "num_layers": 2, "query_key_size": 8, "relative_buckets": 8}
    types = {"dtype": "float64", "param_dtype": "float64"}
    return FlashConfig(**sizes | types | options, attention=AttentionConfig(attention, 4, 7))


def model(attention: str = "augmented", kind: type[Flash] | type[FlashEncoder] = Flash, **options: Any) -> Any:
    return random_model(lambda rngs: kind(config(attention, **options), rngs=rngs))


@pytest.mark.parametrize("attention", some_of(["flash", "augmented", "softmax"], 1))
def test_forms_agree(attention: str, x64: None) -> None:
    """Each node takes its shift from its parent, the root from the last token; scores are divided by positions."""
    assert_forms_agree(model(attention))


@pytest.mark.thorough
def test_drafts_change_nothing(x64: None) -> None:
    assert_drafts_change_nothing(model(), 15)


@pytest.mark.parametrize("shift", [True, False])
def test_documents_are_apart(shift: bool, x64: None) -> None:
    """The first token of a document takes nothing from the document before it."""
    assert_documents_are_apart(model(shift_tokens=shift))


def test_published_length_scale_cannot_decode() -> None:
    for attention in ("softmax", "square"):
        published = nnx.eval_shape(
            lambda name=attention: Flash(config(name, length_scale="row", **SINGLE), rngs=nnx.Rngs(0))
        )
        with pytest.raises(UserError, match="set length_scale to 'position'"):
            published.init_state(1, 8)


def test_encoder_does_not_see_what_is_masked(x64: None) -> None:
    """Whatever stands under the mask, at either end or inside, outputs elsewhere stay the same to the last bit."""
    encoder = model("flash+convolution", FlashEncoder)
    tokens, mask = draw_tokens(3, 13), np.ones((3, 13), bool)
    mask[0, 9:] = mask[1, :3] = mask[2, 5] = mask[2, 8:10] = False
    results = [
        np.asarray(forward(encoder, jnp.asarray(np.where(mask, tokens, filler)), mask=jnp.asarray(mask)))
        for filler in (0, 7)
    ]
    assert np.array_equal(results[0][mask], results[1][mask])
    assert not np.array_equal(results[0][~mask], results[1][~mask])


def test_encoder_sees_both_sides(x64: None) -> None:
    """But for the convolution and the token shift, which look back."""
    encoder, tokens = model("flash+convolution", FlashEncoder), draw_tokens(1, 9)
    changed = np.where(np.arange(9) == 8, (tokens + 1) % 19, tokens)
    before, after = (np.asarray(forward(encoder, jnp.asarray(part))) for part in (tokens, changed))
    assert np.all(np.max(np.abs(before - after), axis=2) > 1e-6)


@pytest.mark.parametrize("attention", some_of(["softmax+local+convolution", "performer+local", *REGISTRY], 6))
def test_every_attention_fits(attention: str) -> None:
    """Shapes of outputs, states, and queries and keys; every parameter has a name."""
    tokens, branches = jnp.zeros((2, 6), int), 2 if attention.startswith(("flash", "linear_angular")) else 1
    for kind in (Flash, FlashEncoder):
        shapes = nnx.eval_shape(lambda kind=kind: kind(config(attention, **SINGLE), rngs=nnx.Rngs(0)))
        assert nnx.eval_shape(type(shapes).__call__, shapes, tokens).shape == (2, 6, 19)
        assert shapes.layers.layers.gamma.shape == (2, 2 * branches, 8)
        assert uncovered(shapes, entries(shapes)) == []
    causal = nnx.eval_shape(lambda: Flash(config(attention, **SINGLE), rngs=nnx.Rngs(0)))
    state = nnx.eval_shape(lambda model: model.init_state(2, 8), causal)
    state = nnx.eval_shape(lambda model, state: model.prefill(tokens, jnp.array([6, 2]), state)[1], causal, state)
    assert state.shift.shape == (2, 2, 7)
    assert state.position.shape == (2, 2)


@pytest.mark.parametrize("attention", ["augmented", "softmax"])
def test_bfloat16_activations(attention: str) -> None:
    """Logits stay float32 and near those of float32."""
    wide, tokens = model(attention, **SINGLE), jnp.asarray(draw_tokens(2, 13))
    narrow = model(attention, **SINGLE | {"dtype": "bfloat16"})
    found, expected = forward(narrow, tokens), forward(wide, tokens)
    assert found.dtype == jnp.float32
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 0.05


@pytest.mark.parametrize("norm", ["scale", "layer"])
def test_names_and_configurations_go_both_ways(norm: str) -> None:
    own = model("flash+convolution", norm=norm, length_scale="row", **SINGLE)
    tensors = named(nnx.state(own, nnx.Param), entries(own))
    assert len(tensors) == 6 + 2 * (10 + {"scale": 1, "layer": 2}[norm])
    assert tensors["layers.1.dwconv.weight"].shape == (1, 1, 7, 1)
    derived = ("abs_pos_emb.inv_freq", "layers.0.rotary_pos_emb.freqs")
    assert all(ignored(name) for name in derived)
    back = config_from_huggingface(config_to_huggingface(own.config), own.config.attention)
    assert back == own.config
    copy = nnx.eval_shape(lambda: Flash(back, rngs=nnx.Rngs(0)))
    read_flash(copy, tensors | {name: np.ones(1) for name in derived})
    for name, tensor in named(nnx.state(copy, nnx.Param), entries(copy)).items():
        assert np.array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 15}, "model.hidden_size is 15; sines and cosines need an even size"),
        ({"query_key_size": 5}, "model.query_key_size is 5; rotary positions need an even size"),
        ({"expansion_factor": 0.0}, "model.expansion_factor is 0.0; give a positive number"),
        ({"norm": "rms"}, "model.norm 'rms' is unknown; choose one of scale, layer"),
        ({"length_scale": "none"}, "model.length_scale 'none' is unknown; choose one of position, row"),
        ({"relative_buckets": 3}, "model.relative_buckets is 3; give an even number, at least 4"),
        ({"relative_max_distance": 4}, "model.relative_max_distance is 4; give more than 4, the distances that 8"),
        ({"vocab_size": None}, "model.vocab_size is not set"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        nnx.eval_shape(lambda: Flash(config(**SINGLE | options), rngs=nnx.Rngs(0)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_configuration_without_a_size() -> None:
    sizes = config_to_huggingface(config())
    del sizes["query_key_size"]
    with pytest.raises(UserError, match=r"^the configuration has no query_key_size; give the config\.json of a FLASH$"):
        config_from_huggingface(sizes)
    assert replace(config_from_huggingface(config_to_huggingface(config())), dtype="float64").attention.name == "flash"
