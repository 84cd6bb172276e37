"""Hugging Face's names and configurations: what goes out comes back, and what does not fit is named."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from support.cells import some_of

from lin_jax.attention import REGISTRY, AttentionConfig
from lin_jax.errors import UserError
from lin_jax.hub.families.llama import config_from_huggingface, config_to_huggingface, read_llama, write_llama
from lin_jax.hub.medusa import read_heads
from lin_jax.models import Llama, LlamaConfig, MedusaHeads, RotaryConfig
from lin_jax.models.params import abstract_heads, abstract_model

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "num_heads": 4}


def config(name: str = "augmented", *, tied: bool = False, dtype: str = "float32") -> LlamaConfig:
    attention = AttentionConfig(name, group_size=4, kernel_size=5)
    return LlamaConfig(**SIZES, num_kv_heads=2, attention=attention, tie_embeddings=tied, param_dtype=dtype)


def random_model(config: LlamaConfig) -> Llama:
    """Every parameter random, also those that begin as constants."""
    model, rng = abstract_model(config), np.random.default_rng(1)
    state = nnx.state(model)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype))
    nnx.update(model, state)
    return model


def written(model: Llama) -> dict[str, np.ndarray]:
    return write_llama(nnx.state(model), model)


def parameters(module: nnx.Module) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def assert_equal(actual: dict[Any, np.ndarray], expected: dict[Any, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert np.array_equal(actual[name], value), name


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(config())


@pytest.mark.parametrize(
    ("name", "tied", "dtype"),
    some_of([("augmented", True, "bfloat16"), *((name, False, "float32") for name in sorted(REGISTRY))], 3),
)
def test_write_then_read(name: str, tied: bool, dtype: str) -> None:
    """Bit for bit, into fresh parameters and into shapes, and out again under the same names."""
    model = random_model(config(name, tied=tied, dtype=dtype))
    tensors = written(model)
    assert ("lm_head.weight" in tensors) is not tied
    for copy in (Llama(model.config, rngs=nnx.Rngs(2)), abstract_model(model.config)):
        read_llama(copy, tensors)
        assert_equal(parameters(copy), parameters(model))
        assert_equal(written(copy), tensors)


def test_published_layout(model: Llama) -> None:
    """Shapes as PyTorch has them, and tap j of the centred kernel at lag K // 2 - j."""
    tensors = written(model)
    assert len(tensors) == 3 + 11 * SIZES["num_layers"]
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (4, 8)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (8, 12)
    assert tensors["model.layers.1.self_attn.global_factor"].shape == (1,)
    kernel = tensors["model.layers.1.self_attn.dwconv.weight"]
    taps = np.asarray(model.layers.layers.attention.mixer.convolution.taps[...][1])
    assert kernel.shape == (4, 1, 5, 1)
    assert np.array_equal(kernel[:, 0, :, 0], np.pad(taps[:, ::-1], ((0, 0), (0, 2))))


def test_all_problems_in_one_line(model: Llama) -> None:
    tensors = written(model)
    before = parameters(model)
    wrong = {name: value + 1 for name, value in tensors.items()}
    del wrong["model.norm.weight"]
    del wrong["model.layers.1.mlp.up_proj.weight"]
    wrong["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    wrong["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    wrong["model.layers.0.self_attn.k_proj.weight"] = np.zeros((8, 8), np.float32)
    wrong["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].T
    wrong["model.layers.0.self_attn.dwconv.weight"] = np.zeros((4, 5), np.float32)
    wrong["model.layers.1.self_attn.dwconv.weight"] = np.zeros((4, 1, 4, 1), np.float32)
    with pytest.raises(UserError) as caught:
        read_llama(model, wrong)
    message = str(caught.value)
    assert "\n" not in message
    assert sorted(message.removeprefix("tensors do not fit the model: ").split("; ")) == [
        "model.layers.0.mlp.gate_proj.weight has shape (8, 12), the model expects (12, 8)",
        "model.layers.0.self_attn.dwconv.weight has shape (4, 5), the model expects (4, 1, 5, 1)",
        "model.layers.0.self_attn.k_proj.weight has shape (8, 8), the model expects (4, 8)",
        "model.layers.0.self_attn.q_proj.bias is unknown",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.1.self_attn.dwconv.weight has shape (4, 1, 4, 1), the model expects (4, 1, 5, 1)",
        "model.layers.2.mlp.up_proj.weight is unknown",
        "model.norm.weight is missing",
    ]
    assert_equal(parameters(model), before)


def test_what_checkpoints_repeat() -> None:
    """A tied head stored beside the embedding, and frequencies, are no fault; another head is."""
    model = random_model(config("softmax", tied=True))
    tensors = written(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    copy = abstract_model(model.config)
    read_llama(copy, tensors)
    assert_equal(parameters(copy), parameters(model))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight is unknown$"):
        read_llama(copy, tensors)


def test_heads(model: Llama) -> None:
    heads = MedusaHeads.on(model, 2)
    rng = np.random.default_rng(0)
    tensors = {}
    for m in range(2):
        tensors[f"{m}.0.linear.weight"] = rng.normal(size=(8, 8)).astype(np.float32)
        tensors[f"{m}.0.linear.bias"] = rng.normal(size=8).astype(np.float32)
        tensors[f"{m}.1.weight"] = rng.normal(size=(11, 8)).astype(np.float32)
    for copy in (heads, abstract_heads(model.config, 2)):
        read_heads(copy, tensors)
        assert np.array_equal(copy.weight[1], tensors["1.0.linear.weight"].T)
        assert np.array_equal(copy.bias[0], tensors["0.0.linear.bias"])
        assert np.array_equal(copy.output[1], tensors["1.1.weight"].T)
    with pytest.raises(UserError, match=r"^tensors do not fit the model: 1\.1\.weight is missing; 2\.1\.weight is unk"):
        read_heads(heads, {name.replace("1.1.", "2.1."): value for name, value in tensors.items()})


HUGGING_FACE = {
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def test_configuration() -> None:
    assert config_from_huggingface(HUGGING_FACE) == LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        norm_eps=1e-6,
        attention=AttentionConfig("softmax"),
        rotary=RotaryConfig(original_context_length=4096, context_length=4096),
    )
    given = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}
    found = config_from_huggingface({**HUGGING_FACE, **given}, AttentionConfig("local"))
    assert (found.kv_heads, found.head_size, found.norm_eps, found.tie_embeddings) == (2, 8, 1e-3, True)
    assert found.attention == AttentionConfig("local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide"),
        ({"rope_scaling": {"type": "su"}}, "rotary.scaling 'su' is unknown"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "full_attention": {"rope_theta": 1e6}}},
            "an object",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "needs rotary.short_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refused_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_huggingface({**HUGGING_FACE, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_without_sizes() -> None:
    with pytest.raises(UserError, match=r"^the configuration has no hidden_size, intermediate_size; give"):
        config_from_huggingface(
            {k: v for k, v in HUGGING_FACE.items() if k not in ("hidden_size", "intermediate_size")}
        )


def rotary(theta: float, scaling: str = "default", factor: float = 1.0, original: int = 4096) -> RotaryConfig:
    return RotaryConfig(theta, scaling, factor, original_context_length=original, context_length=4096)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, rotary(1e4)),
        ({"rope_theta": 5e5}, rotary(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, rotary(5e5)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, rotary(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, rotary(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, rotary(5e5, "linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, rotary(1e4, "linear", 4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            rotary(5e5, "linear", 4.0),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            rotary(1e4, "linear", 4.0),
        ),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, rotary(5e5, "llama3", 8.0, 512)),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 5e5}}, rotary(5e5, "llama3", 8.0, 512)),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": None},
                "original_max_position_embeddings": 512,
            },
            rotary(1e4, "yarn", 8.0, 512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024, "factor": None}},
            rotary(1e4, "yarn", 4.0, 1024),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
            rotary(1e4, "dynamic", 2.0),
        ),
        ({"partial_rotary_factor": 0.5}, rotary(1e4)),
        (
            {"rope_parameters": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5},
            replace(rotary(1e4, "proportional"), partial_rotary_factor=0.5),
        ),
    ],
)
def test_old_and_new_rotary_options(options: dict[str, Any], expected: RotaryConfig) -> None:
    """As they stand in a file, and as transformers rewrites them when it reads the file."""
    given = {**HUGGING_FACE, **options}
    rewritten = transformers.LlamaConfig(**deepcopy(given)).to_dict()
    assert "rope_scaling" not in rewritten
    assert config_from_huggingface(given).rotary == expected
    assert config_from_huggingface(rewritten).rotary == expected


@pytest.mark.parametrize(
    "given",
    [
        rotary(5e5),
        rotary(5e5, "linear", 4.0),
        rotary(5e5, "dynamic", 2.0),
        replace(rotary(5e5, "llama3", 8.0, 512), low_freq_factor=2.0),
        replace(rotary(5e5, "yarn", 8.0, 512), mscale=0.7, truncate=False, attention_factor=0.9),
        replace(rotary(5e5, "yarn", 8.0, 512), scaling="longrope", short_factor=(1.0,), long_factor=(2.0,)),
        replace(rotary(5e5, "proportional"), partial_rotary_factor=0.5),
    ],
    ids=lambda each: each.scaling,
)
def test_rotary_options_out_and_in_again(given: RotaryConfig) -> None:
    """Also after transformers has read and rewritten them."""
    said = config_to_huggingface(replace(config(), rotary=given, head_dim=4))
    rewritten = transformers.LlamaConfig(**deepcopy(said)).to_dict()
    assert config_from_huggingface(said).rotary == given
    assert config_from_huggingface(rewritten).rotary == given


def test_a_length_that_no_file_can_say() -> None:
    with pytest.raises(UserError, match="has no place in a config"):
        config_to_huggingface(replace(config(), rotary=replace(rotary(1e4, "dynamic", 2.0), context_length=8192)))


WINDOWED = {"use_sliding_window": True, "sliding_window": 9}
SLIDING = AttentionConfig("softmax", window=9)
FULL = AttentionConfig("softmax")
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 9}, [SLIDING] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [FULL] * 3),
        ({"model_type": "llama", "sliding_window": 9}, [FULL] * 3),
        ({"model_type": "qwen2", "sliding_window": 9}, [FULL] * 3),
        ({"model_type": "qwen2", **WINDOWED}, [FULL] * 3),
        ({"model_type": "qwen2", **WINDOWED, "max_window_layers": 1}, [FULL, SLIDING, SLIDING]),
        ({"model_type": "qwen3", **WINDOWED, "max_window_layers": 0}, [SLIDING] * 3),
        ({"model_type": "qwen3", **WINDOWED, "layer_types": TYPES}, [SLIDING, FULL, SLIDING]),
    ],
)
def test_windows(options: dict[str, Any], expected: list[AttentionConfig]) -> None:
    """As transformers reads them, layer by layer; they go out under the same names, and come back."""
    sizes = HUGGING_FACE | {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16}
    found = config_from_huggingface(sizes | options)
    assert list(found.attention.of_layers(3)) == expected
    theirs = transformers.AutoConfig.for_model(**sizes | options)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    window = None if options["model_type"] == "llama" else getattr(theirs, "sliding_window", None)
    assert [each.window for each in expected] == [window if "sliding" in kind else None for kind in kinds]
    said = config_to_huggingface(found)
    again = config_from_huggingface(said)
    assert again.attention.of_layers(3) == found.attention.of_layers(3)
    if SLIDING in expected:
        names = set(options) - {"layer_types"}
        assert {name: said[name] for name in names} == {name: options[name] for name in names}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": TYPES[:2]}, "layer_types names 2 layers in the configuration, which has 3"),
        ({"layer_types": ["sliding"] * 3}, "give a list of full_attention and sliding_attention"),
        ({"layer_types": TYPES, "use_sliding_window": False}, "names sliding_attention without a window; set"),
        ({"max_window_layers": -1}, "max_window_layers is -1 in the configuration; give"),
    ],
)
def test_windows_that_no_model_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_huggingface(HUGGING_FACE | {"num_hidden_layers": 3, "model_type": "qwen2", **WINDOWED, **options})


BIASES = ("attention_bias", "output_bias", "query_key_norm")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "llama", "attention_bias": True}, (True, True, False)),
        ({"model_type": "mistral", "sliding_window": None, "attention_bias": True}, (False, False, False)),
        ({"model_type": "mistral", "sliding_window": 4096}, (False, False, False)),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, (True, False, False)),
        ({"model_type": "qwen2", "sliding_window": 512}, (True, False, False)),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "sliding_window": 9}, (False, False, True)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, True)),
    ],
)
def test_relatives(options: dict[str, Any], expected: tuple[bool, ...]) -> None:
    """Options of a type come into our configuration and go out as a type again that implies the same."""
    found = config_from_huggingface(HUGGING_FACE | {"num_key_value_heads": 2} | options)
    assert tuple(getattr(found, name) for name in BIASES) == expected
    assert found.head_size == (128 if options["model_type"] == "qwen3" else 16)
    again = config_from_huggingface(config_to_huggingface(found))
    assert again == replace(found, head_dim=found.head_size)


def test_options_that_no_type_has() -> None:
    for options in ({"output_bias": True}, {"attention_bias": True, "query_key_norm": True}):
        with pytest.raises(UserError, match="no model of transformers has"):
            config_to_huggingface(replace(config(), **options))
