"""Windows whose memory reads queries and keys as they were before rotary positions turned them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import QKV, AttentionConfig, build_mixer, tree_arrays, whole_rows
from lin_jax.attention.memory_start import fit_memory
from lin_jax.errors import UserError
from lin_jax.models import Gpt2, Gpt2Config, Llama, LlamaConfig
from lin_jax.models.rotary import RotaryConfig, RotaryTurn

ATTENTION = AttentionConfig("clustered+window", window=4, features=5, rotary_memory=False)
NAMES = ("query_map", "query_bias", "key_map", "key_bias")
CONFIG = LlamaConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    initializer_range=0.6,
    attention=ATTENTION,
    dtype="float64",
    param_dtype="float64",
)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 19)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        yield Llama(CONFIG, rngs=nnx.Rngs(0))


def turned(x, position):
    """A vector turned by its position, pair by pair."""
    half = len(x) // 2
    turns = np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
    pairs = (x[:half] + 1j * x[half:]) * turns
    return np.concatenate([pairs.real, pairs.imag])


def slow(mixer, queries, keys, values, window, sinks):
    """Outputs `[T, H, D]` of one document, token by token."""
    part = jax.tree.map(np.asarray, {name: getattr(mixer.linear.features, name)[...] for name in NAMES})
    out, size = np.zeros_like(queries), queries.shape[-1]
    for t, head in np.ndindex(*queries.shape[:2]):
        group, asking = head // 2, queries[t, head]
        sums, total = np.zeros(size), 0.0
        read = np.exp(part["query_map"][group, head % 2] @ asking / size**0.25 + part["query_bias"][group, head % 2])
        for s in range(t + 1):
            key = keys[s, group]
            if s > t - window or s < sinks:
                weight = np.exp(turned(asking, t) @ turned(key, s) / size**0.5)
            else:
                scores = np.exp(part["key_map"][group] @ key / size**0.25 + part["key_bias"][group])
                weight = np.exp(float(mixer.balance[...][group, head % 2])) * (read @ scores / scores.sum())
            sums, total = sums + weight * values[s, group], total + weight
        out[t, head] = sums / total
    return out


@pytest.mark.parametrize("sinks", [0, 2])
def test_outputs_are_those_of_a_loop(sinks, x64):
    rng = np.random.default_rng(1)
    config = replace(ATTENTION, sinks=sinks)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 4, "param_dtype": jnp.float64}
    mixer = build_mixer(config, **sizes, rngs=nnx.Rngs(0), turn=RotaryTurn(RotaryConfig()))
    mixer.balance[...] = jnp.asarray(rng.normal(size=(2, 2)))
    qkv = QKV(*(rng.normal(size=(1, 15, heads, 4)) for heads in (4, 2, 2)))
    found = jax.jit(lambda mixer, qkv: mixer.parallel(qkv, whole_rows(1, 15))[0])(mixer, qkv)
    np.testing.assert_allclose(found[0], slow(mixer, *(part[0] for part in qkv), 4, sinks), rtol=1e-10, atol=1e-12)


def shifted(model, tokens, by):
    """Logits of rows that begin at a position."""
    layout = whole_rows(*tokens.shape)
    x, context = model.begin(tokens, layout.positions + by)
    x, _ = model.run(lambda block, x, _: block.parallel(x, context, layout, None), x, None)
    return model.logits(model.outputs(x))


def test_a_text_means_the_same_wherever_it_begins(model, x64):
    run = jax.jit(shifted)
    np.testing.assert_allclose(run(model, TOKENS, 5000), model(TOKENS), rtol=1e-9)
    other = Llama(replace(CONFIG, attention=replace(ATTENTION, rotary_memory=True)), rngs=nnx.Rngs(0))
    near, far = (np.asarray(run(other, TOKENS, by)) for by in (0, 5000))
    np.testing.assert_allclose(far[:, :4], near[:, :4], rtol=1e-9)
    assert not np.allclose(far[:, 5:], near[:, 5:], rtol=1e-3)


def test_decoding_and_trees_are_what_whole_rows_say(model, x64):
    expected = np.asarray(jax.jit(lambda model: model(TOKENS))(model))
    lengths, state = jnp.asarray([9, 6]), model.init_state(2)
    hidden, state = jax.jit(lambda model, state: model.prefill(TOKENS[:, :9], lengths, state))(model, state)
    for row, length in enumerate((9, 6)):
        np.testing.assert_allclose(model.logits(hidden)[row, :length], expected[row, :length], rtol=1e-9)
    # A chain of five with a wrong branch beside its second node.
    tree = tree_arrays((-1, 0, 0, 1, 3, 4))
    nodes = np.stack([TOKENS[0, [9, 10, 12, 11, 12, 13]], TOKENS[1, [6, 7, 3, 8, 9, 10]]])
    verify = jax.jit(lambda model, nodes, state: model.verify(nodes, tree, state))
    outputs, kept = verify(model, nodes, state)
    path = jnp.asarray([[0, 1, 3, 4, 5]] * 2)
    for row, length in enumerate((9, 6)):
        found = model.logits(outputs)[row, path[row]]
        np.testing.assert_allclose(found, expected[row, length : length + 5], rtol=1e-9)
    state = jax.jit(lambda model, *given: model.commit(*given))(model, state, kept, path, jnp.asarray([5, 3]))
    last = np.stack([TOKENS[0, 14:15], TOKENS[1, 9:10]])
    outputs, _ = jax.jit(lambda model, last, state: model.verify(last, tree_arrays((-1,)), state))(model, last, state)
    for row, position in enumerate((14, 9)):
        np.testing.assert_allclose(model.logits(outputs)[row, 0], expected[row, position], rtol=1e-9)


def test_it_is_fitted_to_what_its_teacher_has_not_turned(x64):
    turn = RotaryTurn(RotaryConfig(scaling="yarn", factor=4.0, original_context_length=16))
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 4, "param_dtype": jnp.float64}
    mixer = build_mixer(ATTENTION, **sizes, rngs=nnx.Rngs(0), turn=turn)
    rng, layout = np.random.default_rng(3), whole_rows(1, 24)
    queries, keys, values = (jnp.asarray(rng.normal(size=(1, 24, heads, 4))) for heads in (4, 2, 2))

    def fitted(by):
        at = layout.positions + by
        teacher = QKV(turn(queries, at), turn(keys, at), values)
        return jax.jit(fit_memory)(mixer, teacher, layout, jax.random.key(0), at)

    (near, shares), (far, _) = fitted(0), fitted(3000)
    assert np.all(np.asarray(shares.after) > 0)
    jax.tree.map(lambda *each: np.testing.assert_allclose(*each, atol=1e-6), *(nnx.state(each) for each in (near, far)))
    # Centres are means of keys that are not turned.
    own = {tuple(np.round(centre, 6)) for centre in np.asarray(near.linear.features.key_map[...])[0]}
    scaled = np.asarray(keys)[0, :, 0] / 4**0.25
    nearest = np.argmin(np.square(scaled[:, None] - np.asarray(sorted(own))).sum(-1), axis=1)
    for number, centre in enumerate(sorted(own)):
        np.testing.assert_allclose(scaled[nearest == number].mean(0), centre, atol=1e-5)


def test_vectors_come_back():
    turn = RotaryTurn(RotaryConfig(scaling="yarn", factor=4.0, original_context_length=16))
    vectors = np.random.default_rng(0).normal(size=(2, 3, 5, 4, 8)).astype(np.float32)
    positions = np.random.default_rng(1).integers(0, 99, (1, 3, 5))
    np.testing.assert_allclose(turn.back(turn(vectors, positions), positions), vectors, atol=1e-5)


def test_where_it_is_not_for():
    with pytest.raises(UserError, match=r"attention.rotary_memory is false, and 'augmented' has no memory"):
        Llama(replace(CONFIG, attention=AttentionConfig(rotary_memory=False)), rngs=nnx.Rngs(0))
    config = Gpt2Config(vocab_size=13, hidden_size=16, num_layers=1, num_heads=4, attention=ATTENTION)
    with pytest.raises(UserError, match=r"attention.rotary_memory is false, and this model has no rotary positions"):
        Gpt2(config, rngs=nnx.Rngs(0))


def test_kernels_that_are_asked_for_are_refused():
    """No kernel reads keys as they were before: a name that could not be followed is refused, not passed over."""

    def shape(config):
        single = replace(config, dtype="float32", param_dtype="float32")
        nnx.eval_shape(lambda: Llama(single, rngs=nnx.Rngs(0)))

    asked = replace(CONFIG, attention=replace(ATTENTION, name="exponential+window", implementation="gpu"))
    with pytest.raises(UserError) as raised:
        shape(asked)
    assert str(raised.value) == (
        "attention.implementation is 'gpu', and no kernel computes a memory of keys as they were before rotary "
        "positions (attention.rotary_memory is false); leave it out, or give 'xla' there"
    )
    with pytest.raises(UserError, match=r"attention.rotary_memory is false"):
        shape(replace(asked, attention=AttentionConfig(pattern=["softmax", asked.attention])))
    shape(replace(asked, attention=replace(asked.attention, implementation="xla")))
    shape(replace(asked, attention=replace(asked.attention, rotary_memory=True)))


def test_layers_of_a_mix_that_have_no_window_have_nothing_to_say():
    mixed = replace(CONFIG, attention=replace(ATTENTION, layers={0: "softmax"}))
    assert [each.rotary_memory for each in mixed.attention.of_layers(2)] == [True, False]
