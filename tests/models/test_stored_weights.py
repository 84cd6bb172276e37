"""Models whose weights are stored for decoding, against the models that learn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig, tree_arrays
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.load import Pretrained
from lin_jax.models import (
    Flash,
    FlashConfig,
    Gpt2,
    Gpt2Config,
    Llama,
    LlamaConfig,
    MedusaHeads,
    PathHead,
    SeparateLayers,
)
from lin_jax.models.params import abstract_model, params_fingerprint, params_of
from lin_jax.models.product_timing import ProductTimes
from lin_jax.models.products import StoredMatrix, dequantized, quantized
from lin_jax.models.separate_layers import as_trained
from lin_jax.models.stored_weights import (
    Storage,
    StoredEmbedding,
    StoredLinear,
    WeightStorage,
    computed_in,
    has_panels,
    restored,
    storage_for,
    store,
    store_heads,
    weight_bytes,
)

AUGMENTED = AttentionConfig("augmented", group_size=4, kernel_size=5)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "attention": AUGMENTED}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=24, num_heads=2, num_kv_heads=1, tie_embeddings=True),
    "qwen": LlamaConfig(**SIZES, intermediate_size=24, num_heads=2, attention_bias=True),
    "gpt2": Gpt2Config(**SIZES, num_heads=2, max_positions=32),
    "flash": FlashConfig(**{**SIZES, "attention": AttentionConfig("flash", group_size=4)}, query_key_size=8),
}
BUILD = {"llama": Llama, "qwen": Llama, "gpt2": Gpt2, "flash": Flash}
# Forms of every kind, as if they had been timed.
TIMES = ProductTimes(
    None,
    {
        "float32 float32 16x24": {"sum": {1: 1.0, 8: 1.0}},
        "bfloat16 float32 16x24": {"split": {1: 1.0, 8: 2.0}, "columns": {1: 2.0, 8: 1.0}},
        "int8 float32 16x24": {"sum": {1: 1.0, 8: 1.0}},
    },
)
STORED = WeightStorage()
TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lin_jax.models.stored_weights.SMALLEST", 1)


def model_of(name: str, **changes):
    return BUILD[name](replace(CONFIGS[name], **changes), rngs=nnx.Rngs(0))


@jax.jit
def logits_of(model, tokens=TOKENS):
    return model(tokens)


@jax.jit
def hidden_of(model, tokens=TOKENS):
    return model.hidden(tokens)


def for_decoding(model, options=STORED):
    model = nnx.clone(model)
    model.layers = SeparateLayers.of(model.layers)
    store(model, Storage(options, TIMES))
    return model


def kinds(model) -> set[str]:
    return {type(node).__name__ for _, node in nnx.iter_modules(model)}


@pytest.mark.parametrize(
    ("name", "stored"),
    cells(
        always=[("llama", "bfloat16")],
        thorough=[(name, stored) for name in CONFIGS for stored in ("float32", "bfloat16")],
    ),
)
def test_a_stored_model_computes_what_the_learning_one_does(name, stored, tmp_path):
    learning = model_of(name, param_dtype=stored)
    decoding = for_decoding(learning)
    assert "Linear" not in kinds(decoding)
    types = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(decoding))}
    assert types == ({"float32"} if stored == "float32" else {"bfloat16", "uint16"})
    np.testing.assert_allclose(logits_of(decoding), logits_of(learning), rtol=1e-5, atol=1e-5)
    assert params_fingerprint(params_of(as_trained(restored(decoding)))) == params_fingerprint(params_of(learning))
    # A session's model is written as the one that learns.
    files = [
        save_pretrained(each, tmp_path / str(n)) / "model.safetensors" for n, each in enumerate((learning, decoding))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", cells(always=["llama"], thorough=["qwen", "gpt2", "flash"]))
def test_int8_is_the_model_with_rounded_matrices(name):
    learning = model_of(name)
    decoding = for_decoding(learning, WeightStorage("int8"))
    rounded = nnx.clone(learning)
    for _, layer in nnx.iter_modules(rounded):
        if isinstance(layer, nnx.Linear):
            kernel = jnp.swapaxes(layer.kernel[...], -1, -2)
            flat = kernel.reshape(-1, kernel.shape[-1])
            layer.kernel[...] = jnp.swapaxes(dequantized(*quantized(flat)).reshape(kernel.shape), -1, -2)
    table = dequantized(*quantized(learning.embed.embedding[...]))
    rounded.embed.embedding[...] = table
    hidden = hidden_of(rounded)
    np.testing.assert_allclose(hidden_of(decoding), hidden, rtol=1e-4, atol=1e-5)
    assert decoding.embed.embedding.dtype == jnp.int8
    np.testing.assert_array_equal(decoding.embed(TOKENS), table[TOKENS])
    if learning.head is None:
        # One int8 table is read, and is the head.
        assert decoding.embed.head is None
        np.testing.assert_allclose(decoding.logits(hidden), hidden @ table.T, rtol=1e-4, atol=1e-5)


def test_small_models_have_panels_beside_their_matrices(tmp_path, monkeypatch):
    timed = {"product io": {1: 1.0, 8: 1.0}, "panels": {1: 0.5, 8: 1.0}, "sum": {1: 0.1, 8: 0.1}}
    times = ProductTimes(None, {"float32 float32 16x24": timed})
    monkeypatch.setattr("lin_jax.models.stored_weights.instruction_set", lambda: "AVX-512")
    learning = model_of("qwen")
    folder = save_pretrained(learning, tmp_path / "folder")
    found = Pretrained.open(folder).load(storage=lambda model: storage_for(model, STORED, times))
    stored = [node for _, node in nnx.iter_modules(found) if isinstance(node, StoredMatrix)]
    assert len(stored) == 2 * 7 + 1
    # With AVX-512, no other form than XLA's own takes the place of it.
    assert all(node.panels.shape[1:] == (node.shape[0], 32) for node in stored)
    assert {node.plan.forms for node in stored} == {((1, "panels"), (8, "product io"))}
    assert isinstance(found.embed, nnx.Embed)
    assert has_panels(found)
    assert not has_panels(learning)
    # A matrix that is there twice is read once a step.
    assert weight_bytes(found) == weight_bytes(learning)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        np.testing.assert_allclose(logits_of(found, tokens), logits_of(learning, tokens), rtol=1e-5, atol=1e-5)
    assert params_fingerprint(params_of(as_trained(restored(found)))) == params_fingerprint(params_of(learning))
    monkeypatch.setattr("lin_jax.models.stored_weights.MOST_IN_PANELS", 100)
    assert storage_for(learning, STORED, times).forms("float32", "float32") == ("product io",)


@pytest.mark.thorough
def test_heads_are_stored_alike():
    model = model_of("qwen")
    hidden = jax.random.normal(jax.random.key(0), (3, 16))
    medusa, path = MedusaHeads.on(model, 3), PathHead.on(model, 8, nnx.Rngs(1))
    medusa.weight[...] = jax.random.normal(jax.random.key(1), medusa.weight.shape)
    expected = medusa(hidden), medusa(hidden, slice(1, 2)), path.guess(hidden, TOKENS.reshape(-1)[:6].reshape(3, 2))
    for heads in (medusa, path):
        store_heads(heads, Storage(WeightStorage(), TIMES), "float32")
        assert "StoredMatrix" in kinds(heads)
    found = medusa(hidden), medusa(hidden, slice(1, 2)), path.guess(hidden, TOKENS.reshape(-1)[:6].reshape(3, 2))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert (medusa.count, medusa.vocab_size, path.hidden_size, path.width, path.vocab_size) == (3, 40, 16, 8, 40)


@pytest.mark.parametrize(
    ("name", "weights"),
    cells(
        always=[("llama", "stored"), ("qwen", "int8")],
        thorough=[(name, weights) for name in CONFIGS for weights in ("stored", "int8")],
    ),
)
def test_a_folder_is_read_as_it_is_stored(tmp_path, name, weights):
    folder = save_pretrained(model_of(name, param_dtype="bfloat16"), tmp_path / "folder")
    learning = from_pretrained(folder, dtype="float32")
    expected = for_decoding(learning, WeightStorage(weights))
    storage = Storage(WeightStorage(weights), TIMES)
    found = Pretrained.open(folder, dtype="float32").load(storage=lambda model: storage)
    assert kinds(found) == kinds(expected)
    for one, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (found, expected)), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    np.testing.assert_array_equal(logits_of(found), logits_of(expected))


def test_another_attention_is_added_to_a_folder_read_for_decoding(tmp_path):
    softmax = model_of("llama", attention=AttentionConfig("softmax"))
    folder = save_pretrained(softmax, tmp_path / "folder")
    opened = Pretrained.open(folder, attention=AUGMENTED)
    found = opened.load(storage=lambda model: Storage(WeightStorage(), TIMES))
    np.testing.assert_allclose(
        logits_of(found), logits_of(from_pretrained(folder, attention=AUGMENTED)), rtol=1e-5, atol=1e-5
    )


def test_a_type_of_computation_leaves_the_parameters():
    model = model_of("llama", param_dtype="bfloat16", dtype="bfloat16")
    other = computed_in(model, "float32", abstract_model)
    assert other.config.dtype == "float32"
    assert logits_of(other).dtype == jnp.float32
    assert params_fingerprint(params_of(other)) == params_fingerprint(params_of(model))
    np.testing.assert_array_equal(logits_of(other), logits_of(model_of("llama", param_dtype="bfloat16")))


def test_small_matrices_and_other_devices_are_left_alone(monkeypatch):
    model = model_of("qwen")
    monkeypatch.setattr("lin_jax.models.stored_weights.SMALLEST", 2**16)
    assert not {"StoredLinear", "StoredEmbedding"} & kinds(for_decoding(model))
    monkeypatch.undo()
    model.layers = SeparateLayers.of(model.layers)
    store(model, Storage(WeightStorage()))
    assert not {"StoredLinear", "StoredEmbedding"} & kinds(model)
    store(model, Storage(WeightStorage("int8")))
    assert isinstance(model.head, StoredLinear)
    assert isinstance(model.head.matrix, StoredMatrix)
    assert isinstance(model.embed, StoredEmbedding)
    assert model.embed.embedding.dtype == jnp.int8


def test_unknown_weights_are_refused():
    with pytest.raises(UserError, match="weights 'int4' are unknown; choose one of stored, int8"):
        WeightStorage("int4")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "parents"),
    cells(always=[("llama", (-1, 0, 1, 0))], thorough=[(name, (-1, 0, 0, 1, 1)) for name in CONFIGS]),
)
def test_nodes_verified_one_by_one_are_the_same_nodes(name, parents):
    model = model_of(name)
    state = model.init_state(2)
    prefill = jax.jit(lambda model, state: model.prefill(TOKENS, np.asarray([5, 4]), state))
    verify = jax.jit(lambda model, tokens, state: model.verify(tokens, tree, state))
    commit = jax.jit(lambda model, *arguments: model.commit(*arguments))
    _, state = prefill(model, state)
    tokens, tree = np.arange(2 * len(parents)).reshape(2, -1), tree_arrays(parents)
    path, length = np.asarray([[0, 1, 3], [0, 2, 3]]), np.asarray([2, 1])
    hidden, nodes = verify(model, tokens, state)
    after = commit(model, state, nodes, path, length)
    model.same_bits = True
    filled, more = verify(model, tokens, state)
    np.testing.assert_allclose(filled, hidden, rtol=1e-5, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (commit(model, state, more, path, length), after)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    read = prefill(model, model.init_state(2))[1]
    for one, other in zip(*map(jax.tree.leaves, (read, state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
