"""Any JSON where others' settings stand: a result or one line, and quickly."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lin_jax.errors import UserError
from lin_jax.hub.config_json import family_of, model_config
from lin_jax.hub.files import generation_ends, read_checkpoint, read_config
from lin_jax.hub.load import Pretrained
from lin_jax.hub.peft_config import read_adapter_config
from lin_jax.models.rotary import SCALINGS

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict.fromkeys(SIZES, 2),
    "mistral": dict.fromkeys(SIZES, 2),
    "qwen3": dict.fromkeys(SIZES, 2),
    "gpt2": dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head"), 2),
    "t5": dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), 2),
    "bert": dict.fromkeys(SIZES, 2),
    "flash_gau": dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "query_key_size"), 2),
}
OPTIONS = """
    activation_function architectures attention attention_bias base_model_type bos_token_id eos_token_id
    expansion_factor feed_forward_proj head_dim hidden_act id2label initializer_factor initializer_range is_decoder
    layer_norm_epsilon
    layer_norm_eps layer_types max_position_embeddings mlp_bias n_inner n_positions norm num_decoder_layers
    num_key_value_heads num_labels output_bias pad_token_id quantization_config query_key_norm relative_buckets
    relative_attention_max_distance relative_attention_num_buckets rms_norm_eps rope_parameters rope_scaling rope_theta
    scale_decoder_outputs shift_tokens sliding_window tie_word_embeddings type_vocab_size use_sliding_window
"""
ROTARY = """
    attention_factor attn_factor beta_fast beta_slow factor high_freq_factor long_factor low_freq_factor mscale
    original_max_position_embeddings partial_rotary_factor rope_theta rope_type short_factor truncate type
"""
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
ATTENTION = "name group_size kernel_size local_score initial_alpha features rank hashes diagonal_layers implementation"
ADAPTER = """
    alpha_pattern bias init_lora_weights lora_alpha lora_bias modules_to_save peft_type r rank_pattern target_modules
    trainable_token_indices use_dora use_qalora use_rslora
"""
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-(2**63), -16, -1, 0, 1, 2, 4, 64, 2**31, 2**64, 10**400]),
    st.sampled_from([-1.0, 0.0, 1e-6, 0.5, 2.0, 1e4, 1e300, float("nan"), float("inf")]),
    st.text(max_size=4),
    st.sampled_from(["softmax", "augmented", "performer+local", "gelu", "silu", *TYPES]),
)
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
rotary = st.dictionaries(st.sampled_from(ROTARY.split()), anything, max_size=4)
attention = st.dictionaries(st.sampled_from(ATTENTION.split()), anything, max_size=3)
options = st.dictionaries(st.sampled_from(OPTIONS.split()), anything, max_size=3)
quickly = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def attempt(act: Any, *arguments: Any) -> Any:
    """The result, or None after a line that says what is wrong."""
    begin, result, line = time.perf_counter(), None, ""
    try:
        result = act(*arguments)
    except UserError as error:
        line = str(error)
    assert time.perf_counter() - begin < 20
    assert "\n" not in line
    assert len(line) < 2000
    return result


def read_model_config(folder: Path) -> Any:
    content = read_config(folder)
    return model_config(family_of(content), content)


@quickly
@given(kind=st.sampled_from(list(CONFIGS)), said=options, rope=rotary, mixer=attention)
@example(kind="llama", said={}, rope={"rope_type": "yarn", "rope_theta": 1.0000001}, mixer={})
@example(kind="llama", said={"head_dim": 2}, rope={"rope_type": "dynamic", "factor": 2.0}, mixer={})
@example(kind="llama", said={}, rope={"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, mixer={})
def test_config(kind: str, said: dict[str, Any], rope: Any, mixer: Any, tmp_path: Path) -> None:
    content = {"model_type": kind, **CONFIGS[kind], **said}
    content |= {"rope_scaling": rope} if rope else {}
    content |= {"attention": mixer} if mixer else {}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    found = attempt(read_model_config, tmp_path)
    if hasattr(found, "rotary") and found.rotary.scaling != "longrope":
        assert np.isfinite(SCALINGS[found.rotary.scaling](found.rotary, found.head_size)[0]).all()
    attempt(generation_ends, tmp_path)


@settings(quickly, max_examples=6)
@given(kind=st.sampled_from(list(CONFIGS)), said=options)
@example(kind="llama", said={"vocab_size": 2**31 - 1, "hidden_size": 2**30})
@example(kind="gpt2", said={"n_positions": 2**31 - 1, "n_embd": 2**30})
@example(kind="t5", said={"d_kv": 2**31 - 1, "num_heads": 2**31 - 1})
def test_model(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    """The model is built without memory, and its tensors are compared."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **said}))
    save_file({name: np.ones(2, np.float32) for name in "abcd"}, tmp_path / "model.safetensors")
    opened = attempt(Pretrained.open, tmp_path)
    assert opened is None or opened.problems()


@quickly
@given(content=anything, places=st.dictionaries(st.text(max_size=3), st.text(max_size=5) | plain, max_size=3))
@example(content=5, places={"a": "a.safetensors", "b": "./a.safetensors"})
@example(content=5, places={"a": "n" * 5000})
def test_index(content: Any, places: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    for each in (content, {"weight_map": content}, {"weight_map": places}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(each))
        attempt(read_checkpoint, tmp_path)


@quickly
@given(content=st.dictionaries(st.sampled_from(ADAPTER.split()), anything, max_size=5), lora=st.booleans())
def test_adapter(content: dict[str, Any], lora: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | ({"peft_type": "LORA"} if lora else {})))
    found = attempt(read_adapter_config, tmp_path)
    assert found is None or (found.rank("layer") >= 1 and found.factor("layer") > 0)


@pytest.mark.parametrize("text", ["", "\ufeff", "null", "5", '"a"', "[]", "{", '{"a": 1e999', "\x00", "{'a': 1}"])
def test_texts_that_are_no_settings(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert attempt(read_config, tmp_path) is None
