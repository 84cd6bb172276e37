from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.evaluation.flops import attention_flops, forward_flops, peak_flops, step_flops
from lin_jax.models import Gpt2Config, Llama, LlamaConfig
from lin_jax.models.adapters import AdapterConfig, adapted
from lin_jax.models.params import abstract_heads, abstract_model, params_of

HEADS, KV_HEADS, SIZE = 4, 2, 16


def llama(attention):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_layers": 2, "num_heads": HEADS}
    return LlamaConfig(**sizes, num_kv_heads=KV_HEADS, attention=attention, unroll=2)


def by_hand(length, seen, lags):
    """Softmax or local pairs, counted one by one: a score and a weighted value each."""
    pairs = sum(1 for query in range(length) for key in range(query + 1) if seen(query, key))
    return HEADS * SIZE * (4 * pairs + 2 * lags * length)


class TestAttention:
    def test_softmax_takes_the_pairs_of_a_triangle(self):
        found = attention_flops(AttentionConfig("softmax"), HEADS, KV_HEADS, SIZE, 13)
        assert found == by_hand(13, lambda query, key: True, 0)

    @pytest.mark.parametrize("length", [8, 13])
    def test_augmented_takes_groups_memory_and_taps(self, length):
        config = AttentionConfig("augmented", group_size=4, kernel_size=5)
        local = by_hand(length, lambda query, key: query // 4 == key // 4, 3)
        memory = length * 2 * SIZE * SIZE * (HEADS + KV_HEADS)
        assert attention_flops(config, HEADS, KV_HEADS, SIZE, length) == local + memory

    @pytest.mark.parametrize("length", [8, 13])
    @pytest.mark.parametrize("name", ["exponential+window", "hedgehog+window"])
    @pytest.mark.parametrize(
        "options", [{}, {"window": 5, "sinks": 2}, {"window_groups": 0, "decay": "token", "sinks": 5}], ids=str
    )
    def test_windows_take_their_pairs_the_memory_and_learnt_features(self, length, name, options):
        config = AttentionConfig(name, group_size=4, features=6, **options)

        def seen(query, key):
            near = query - key < 5 if "window" in options else query // 4 - key // 4 <= config.window_groups
            return near or key < config.sinks

        rows, matrix = (6, 6 * SIZE) if "exponential" in name else (2 * SIZE, SIZE * SIZE)
        memory = length * 2 * (rows * SIZE + matrix) * (HEADS + KV_HEADS)
        gates = length * 2 * KV_HEADS * SIZE if "decay" in options else 0
        found = attention_flops(config, HEADS, KV_HEADS, SIZE, length)
        assert found == by_hand(length, seen, 0) + memory + gates

    def test_augmented_costs_the_same_for_every_token(self):
        config = AttentionConfig("augmented", group_size=64)
        short, long = (attention_flops(config, HEADS, KV_HEADS, SIZE, length) / length for length in (2048, 32768))
        assert short == long


def shapes(config, purpose="causal_lm"):
    return params_of(abstract_model(config, purpose))


class TestStep:
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160

    @pytest.mark.parametrize(
        "name", ["softmax", "augmented", "performer+local+convolution", "linformer", "yoso", "exponential+window"]
    )
    @pytest.mark.parametrize(
        "options", [{}, {"tie_embeddings": True}, {"query_key_norm": True, "attention_bias": True, "output_bias": True}]
    )
    def test_a_llama_by_hand(self, name, options):
        """Whatever norms, biases and mixers have of their own, and whether the embedding is the head, too."""
        config = replace(llama(AttentionConfig(name)), **options)
        token = 2 * (2 * self.layer + 64 * 96)
        mixing = 2 * attention_flops(config.attention, HEADS, KV_HEADS, SIZE, 10)
        assert step_flops(config, shapes(config), {}, 3, 10) == 3 * 3 * (10 * token + mixing)
        assert forward_flops(config, shapes(config), 10) == 10 * token + mixing

    def test_what_is_frozen_goes_forward_only(self):
        config = llama(AttentionConfig("softmax"))
        params, teacher = shapes(config), abstract_model(config)
        once = step_flops(config, params, {}, 3, 10)
        token = 2 * (2 * self.layer + 64 * 96)
        assert step_flops(config, params, {"teacher": teacher}, 3, 10) == once + 3 * 10 * token
        assert step_flops(config, {}, params, 3, 10) == once - 2 * 3 * 10 * token

    def test_adapters_and_heads_are_matrices(self):
        config = llama(AttentionConfig("softmax"))
        heads = params_of(abstract_heads(config, 3))
        adapters = params_of(adapted(abstract_model(config), AdapterConfig(rank=4, target_modules=("query",))))
        found = [
            step_flops(config, params, {}, 1, 1) - step_flops(config, {}, {}, 1, 1) for params in (heads, adapters)
        ]
        assert found[0] == 6 * 3 * (64 * 64 + 64 * 96)
        assert found[1] == 6 * (2 * (self.layer + 2 * 4 * 64) + 64 * 96)

    def test_a_classifier_has_no_head_over_the_vocabulary(self):
        config = Gpt2Config(vocab_size=96, hidden_size=64, num_layers=2, num_heads=HEADS, num_labels=3)
        model, classifier = (forward_flops(config, shapes(config, each), 1) for each in ("causal_lm", "classifier"))
        assert model - classifier == 2 * 64 * (96 - 3)


def test_little_is_missing_of_what_the_compiler_counts():
    # Plain XLA computes the masked half of the pairs too.
    config = llama(AttentionConfig("softmax", implementation="xla"))
    model, length = Llama(config, rngs=nnx.Rngs(0)), 64
    compiled = jax.jit(lambda model, tokens: model(tokens)).lower(model, jnp.zeros((1, length), jnp.int32)).compile()
    masked = config.num_layers * 4 * HEADS * SIZE * (length * length - length * (length + 1) // 2)
    counted = compiled.cost_analysis()["flops"]
    assert 0.85 * counted < forward_flops(config, shapes(config), length) + masked <= counted


def test_peaks_by_the_name_of_the_device():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "TPU v5 lite": 197e12, "TPU v5": 459e12}
    assert {name: peak_flops(SimpleNamespace(device_kind=name)) for name in names} == names
    assert peak_flops(SimpleNamespace(device_kind="abacus")) is None
