"""Shares of branches in heads' outputs, against attention taken apart layer by layer."""

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig, single_rows
from lin_jax.errors import UserError
from lin_jax.evaluation.branch_shares import branch_shares
from lin_jax.models import Llama, LlamaConfig

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 13)).astype(np.int32)
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "initializer_range": 0.4}


def test_shares_are_what_a_branch_changes_in_each_head():
    attention = AttentionConfig("augmented", group_size=3, kernel_size=5, initial_alpha=0.3)
    model = Llama(LlamaConfig(**SIZES, num_layers=2, attention=attention), rngs=nnx.Rngs(0))
    taps = model.layers.layers.attention.mixer.convolution.taps
    taps[...] = np.random.default_rng(1).normal(0, 0.3, taps.shape).astype(np.float32)
    found = branch_shares(model, TOKENS)
    assert set(found) == {"local", "memory", "convolution"}
    layout = single_rows(TOKENS.shape, None)
    x, context = model.begin(TOKENS, layout.positions)
    graph, parameters = nnx.split(model.layers.layers)

    @jax.jit
    def apart(parameters, x):
        """The mixer's outputs, whole and without each branch, and the layer's."""
        block = nnx.merge(graph, parameters)
        mixer = block.attention.mixer
        qkv = block.attention.project(block.attention_norm(x), context)
        rest = {branch: mixer.without(branch).parallel(qkv, layout)[0] for branch in found}
        return mixer.parallel(qkv, layout)[0], rest, block.parallel(x, context, layout, None)[0]

    for layer in range(2):
        whole, rests, x = apart(jax.tree.map(lambda leaf, layer=layer: leaf[layer], parameters), x)
        whole = np.asarray(whole, np.float64)
        for branch, shares in found.items():
            rest = np.asarray(rests[branch], np.float64)
            for head in range(2):
                expected = np.linalg.norm(whole[:, :, head] - rest[:, :, head]) / np.linalg.norm(whole[:, :, head])
                assert shares[layer, head] == pytest.approx(expected, rel=1e-4)
                assert expected > 0


def test_a_layer_without_a_branch_has_no_share():
    window = {"name": "exponential+window", "window": 4}
    config = LlamaConfig(**SIZES, num_layers=2, attention=AttentionConfig(group_size=4, pattern=["softmax", window]))
    found = branch_shares(Llama(config, rngs=nnx.Rngs(0)), TOKENS)
    assert set(found) == {"window", "memory"}
    for shares in found.values():
        assert np.all(np.isnan(shares[0]))
        assert np.all(shares[1] > 0)


def test_other_models_and_unknown_tokens_are_refused():
    model = Llama(LlamaConfig(**SIZES, num_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a token is not among the model's 11; encode with its own tokenizer"):
        branch_shares(model, TOKENS + 11)
    model.layers = None
    with pytest.raises(UserError, match="branches of a Llama are not measured; give a LLaMA or GPT-2"):
        branch_shares(model, TOKENS)
