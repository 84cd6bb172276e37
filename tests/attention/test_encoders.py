"""The bidirectional and cross forms against the oracle, with padding and packing; relative bias; random features."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import some_of
from support.oracle import Oracle

from lin_jax.attention import (
    QKV,
    REGISTRY,
    AttentionConfig,
    Conventions,
    RelativeBias,
    build_mixer,
    masked_rows,
    packed_rows,
    padded_rows,
    parse_name,
    redraw,
    tree_arrays,
    whole_rows,
)
from lin_jax.attention.feature_maps import HashCollisions
from lin_jax.attention.yoso import collision_probability
from lin_jax.errors import UserError

HEADS, KV_HEADS, SIZE, GROUP = 4, 2, 4, 5
AUGMENTED = (
    "augmented",
    "linear_angular+convolution",
    "relu+local+convolution",
    "linformer+local+convolution",
    "exponential+window+convolution",
    "hedgehog+window/2",  # with sinks
)
pytestmark = pytest.mark.usefixtures("x64")


def config_of(name: str) -> AttentionConfig:
    name, _, sinks = name.partition("/")
    options = {"initial_alpha": 0.7, "features": 8, "rank": 2, "hashes": 3, "hash_bits": 2, "sinks": int(sinks or 0)}
    return AttentionConfig(name, GROUP, 7, **options)


def mixer_of(name: str, form: Any, layer: int = 1, **options: Any) -> Any:
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE, "layer": layer}
    mixer = build_mixer(config_of(name), form=form, **sizes, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape)) / 2
    return mixer


def inputs_of(seed: int, batch: int, length: int) -> QKV:
    rng = np.random.default_rng(seed)
    return QKV(*(rng.normal(size=(batch, length, heads, SIZE)) for heads in (HEADS, KV_HEADS, KV_HEADS)))


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def names(form: str) -> list[Any]:
    bases = [name for name, entry in REGISTRY.items() if form in entry.forms]
    more = [name for name in AUGMENTED if form in REGISTRY[parse_name(name.partition("/")[0]).base].forms]
    layers = [(name, 1) for name in bases + more]
    layers += [("transnormer", 0)] if "transnormer" in bases else []
    return some_of(
        layers, {(name, 1) for name in ("augmented", "softmax", "linformer", "performer", "transnormer", "yoso")}
    )


@partial(jax.jit, static_argnames="length")
def encode(mixer: Any, inputs: QKV, mask: jax.Array, segment_ids: jax.Array, length: int) -> Any:
    """Whole rows, rows under a mask, and rows of documents, in one program."""
    return (
        mixer.bidirectional(QKV(*(part[:, :length] for part in inputs)), whole_rows(len(mask), length)),
        mixer.bidirectional(inputs, masked_rows(mask)),
        mixer.bidirectional(inputs, packed_rows(segment_ids)),
    )


@pytest.mark.parametrize(("name", "layer"), names("bidirectional"))
def test_encoders(name: str, layer: int) -> None:
    """A row alone, under padding of any content, and beside another document: the oracle's outputs."""
    mixer = mixer_of(name, "bidirectional", layer)
    oracle = Oracle(config_of(name), mixer, layer, tables=False)
    inputs = inputs_of(1, 1, 21)
    first, second = 13, 6
    mask = np.arange(21) < first
    segment_ids = np.where(mask, 3, np.where(np.arange(21) < first + second, 2, 0))
    whole, masked, packed = encode(mixer, inputs, mask[None], segment_ids[None].astype(np.int32), first)
    expected = oracle.bidirectional(*(part[0, :first] for part in inputs))
    for outputs in (whole, masked, packed):
        close(outputs[0, :first], expected)
    other = oracle.bidirectional(*(part[0, first : first + second] for part in inputs))
    close(packed[0, first : first + second], other)


@pytest.mark.parametrize(("name", "layer"), names("cross"))
def test_readers_of_an_encoder(name: str, layer: int) -> None:
    """Queries of a decoder, all at once and each alone, over a source with padding of any content."""
    mixer = mixer_of(name, "cross", layer)
    source, queries = inputs_of(2, 1, 18), inputs_of(3, 1, 11)[0]
    mask = (np.arange(18) < 13)[None]

    @jax.jit
    def read(mixer: Any, queries: jax.Array, positions: jax.Array) -> jax.Array:
        return mixer.read(queries, positions, mixer.condense(*source[1:], masked_rows(mask)))

    expected = Oracle(config_of(name), mixer, layer).cross(queries[0], source[1][0, :13], source[2][0, :13])
    close(read(mixer, queries, jnp.arange(11)[None])[0], expected)
    close(read(mixer, queries[:, 6:7], jnp.array([[6]]))[0], expected[6:7])


@pytest.mark.parametrize("name", ["softmax", "flash", "relu", "yoso", "linformer", "square"])
def test_bfloat16(name: str) -> None:
    """Encoders and readers within 0.03 of the largest output of float64 on the same, rounded inputs."""
    inputs = QKV(*(jnp.asarray(part, jnp.bfloat16) for part in inputs_of(12, 1, 21)))
    wide = [np.asarray(part[0], np.float64) for part in inputs]
    mixer = mixer_of(name, "bidirectional")
    oracle = Oracle(config_of(name), mixer, 1, tables=False)
    found = jax.jit(lambda mixer, inputs: mixer.bidirectional(inputs, whole_rows(1, 21)))(mixer, inputs)
    pairs = [(found, oracle.bidirectional(*wide))]
    if "cross" in REGISTRY[name].forms:
        reader = mixer_of(name, "cross")

        @jax.jit
        def read(mixer: Any, inputs: QKV) -> jax.Array:
            memory = mixer.condense(inputs.keys, inputs.values, whole_rows(1, 21))
            return mixer.read(inputs.queries, jnp.arange(21)[None], memory)

        pairs.append((read(reader, inputs), Oracle(config_of(name), reader, 1).cross(*wide)))
    for outputs, expected in pairs:
        assert outputs.dtype == jnp.bfloat16
        scale = np.abs(expected).max()
        close(outputs[0].astype(jnp.float64) / scale, expected / scale, 0.03)


@pytest.mark.parametrize("name", ["softmax", "augmented"])
def test_causal_rows_under_a_mask(name: str) -> None:
    """Tokens that are not present change nothing, wherever they stand."""
    mixer = mixer_of(name, "causal")
    inputs = inputs_of(4, 1, 17)
    mask = np.ones((1, 17), bool)
    mask[0, [3, 4, 11]] = False
    outputs = [
        jax.jit(lambda mixer, inputs: mixer.parallel(inputs, masked_rows(mask))[0])(mixer, changed)
        for changed in (inputs, QKV(*(np.where(mask[..., None, None], part, 1e3) for part in inputs)))
    ]
    close(outputs[0][mask], outputs[1][mask])


@pytest.mark.parametrize("where", ["scores", "weights"])
@pytest.mark.parametrize("name", ["softmax", "flash"])
def test_relative_bias_in_every_causal_form(name: str, where: Any) -> None:
    """Whole rows, packed rows, pieces and single tokens add the same bias; it is the one of a plain double loop."""
    mixer = mixer_of(name, "causal", conventions=Conventions(bias=where))
    table = np.random.default_rng(5).normal(size=(8, HEADS))
    length = 12
    inputs = inputs_of(6, 1, length)

    @jax.jit
    def forms(mixer: Any, inputs: QKV, table: jax.Array) -> list[jax.Array]:
        bias = RelativeBias(table, False, 20)
        whole = mixer.parallel(inputs, whole_rows(1, length), None, bias)[0]
        packed = mixer.parallel(inputs, packed_rows(jnp.ones((1, length), jnp.int32)), None, bias)[0]
        state = mixer.init_state(1, 32, jnp.float64)
        part = QKV(*(part[:, :7] for part in inputs))
        begin, state = mixer.parallel(part, padded_rows(jnp.array([7]), 7, state.position), state, bias)
        tree = tree_arrays(tuple(range(-1, 4)))
        end, _ = mixer.verify(QKV(*(part[:, 7:] for part in inputs)), tree, state, bias)
        return [whole, packed, jnp.concatenate([begin, end], axis=1)]

    whole, *others = forms(mixer, inputs, table)
    for other in others:
        close(whole, other)
    queries, keys, values = (part[0] for part in inputs)
    buckets = [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6]
    expected = np.zeros((length, HEADS, SIZE))
    for t in range(length):
        for head in range(HEADS):
            k, v = keys[: t + 1, head // 2], values[: t + 1, head // 2]
            bias = table[[buckets[t - s] for s in range(t + 1)], head]
            if name == "softmax":
                weights = np.exp(k @ queries[t, head] / 2 + bias)
                expected[t, head] = weights / weights.sum() @ v
            else:
                cosines = k @ queries[t, head] / np.linalg.norm(k, axis=1) / np.linalg.norm(queries[t, head])
                squared = np.maximum(cosines + bias * (where == "scores"), 0) ** 2 + bias * (where == "weights")
                same = np.arange(t + 1) // GROUP == t // GROUP
                expected[t, head] = np.where(same, squared, cosines) @ v
    close(whole[0], expected)


def test_hash_tables_estimate_the_expectation() -> None:
    """The share of collisions over many tables is the probability that training takes."""
    vectors = np.random.default_rng(7).normal(size=(2, 6, 1, SIZE))
    features = HashCollisions(SIZE, 20_000, 3, rngs=nnx.Rngs(0))
    shares = features.scores(vectors[0][:, :, None], vectors[1])[0, 0]
    units = [part[:, 0] / np.linalg.norm(part[:, 0], axis=1, keepdims=True) for part in vectors]
    close(shares, collision_probability(jnp.asarray(units[0] @ units[1].T), 3), 0.02)


@pytest.mark.parametrize(
    ("name", "kernel"), some_of([("performer", lambda q, k: q @ k / 2), ("rfa", lambda q, k: q @ k - 1)], 1)
)
def test_random_features_estimate_their_kernels(name: str, kernel: Any) -> None:
    """With many features, the weights are exponentials; drawn anew, they are others with the same mean."""
    config = AttentionConfig(name, features=40_000)
    mixer = build_mixer(config, heads=1, kv_heads=1, head_dim=SIZE, rngs=nnx.Rngs(0))
    vectors = np.random.default_rng(8).normal(size=(2, 5, SIZE))
    queries, keys = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = np.exp([[kernel(q, k) for k in keys] for q in queries])
    before = np.asarray(mixer.linear.features.projection[...])
    for _ in range(2):
        scores = mixer.linear.features.scores(queries[:, None, None], keys[:, None])[0, 0]
        close(scores / scores.sum(1, keepdims=True), expected / expected.sum(1, keepdims=True), 0.03)
        redraw(mixer, jax.random.key(1))
    assert not np.array_equal(before, mixer.linear.features.projection[...])


def test_relu_features_that_vanish_give_zero_not_nan() -> None:
    """Also in bfloat16, and with values so small that their products underflow."""
    mixer = mixer_of("relu", "causal")
    inputs = [-np.abs(part) for part in inputs_of(9, 1, 12)]
    for dtype, scale in ((jnp.float64, 1.0), (jnp.bfloat16, 1.0), (jnp.bfloat16, 1e-30)):
        queries, keys, values = (jnp.asarray(part * scale, dtype) for part in inputs)
        total = jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(mixer.parallel(QKV(q, k, v), whole_rows(1, 12))[0])))
        outputs, gradient = total(queries, keys, values)
        assert outputs == 0
        assert not np.any(np.isnan(gradient))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("retnet", "'retnet' is unknown; choose one of augmented, softmax"),
        ("relu+locals", r"'\+locals' is unknown"),
        ("flash+local", "flash has a local branch already"),
        ("flash+window", r"\+window needs positive features; choose one of performer, relu"),
        ("relu+local+window", "takes the place of the local branch"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixer_of(name, "causal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "relu", "window": 4}, "'relu' has none; add \\+window"),
        ({"name": "yoso", "decay": "token"}, "yoso has no memory that decays; choose one of flash_global"),
        ({"name": "relu+window", "window": 0}, "attention.window is 0; give at least 1"),
        ({"name": "relu+window", "window_groups": -1}, "attention.window_groups is -1; give zero or more"),
        ({"name": "relu+window", "sinks": -1}, "attention.sinks is -1; give zero or more"),
        ({"name": "relu", "sinks": 2}, "'relu' has no window that they would stay beside; add \\+window to its name"),
        ({"name": "softmax", "sinks": 2}, "'softmax' has no window that they would stay beside"),
        ({"name": "relu", "decay": "slow"}, "attention.decay is 'slow'; choose one of none, constant, token"),
    ],
)
def test_windows_and_decays_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_mixer(AttentionConfig(**options), heads=2, kv_heads=2, head_dim=2, rngs=nnx.Rngs(0))


def test_forms_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="'yoso' has no cross form; choose one of softmax, flash_local"):
        mixer_of("yoso", "cross")
    for form in ("bidirectional", "cross"):
        with pytest.raises(UserError, match=f"'token', and {form} attention has no direction to decay in; set it to"):
            build_mixer(
                AttentionConfig("relu", decay="token"), form=form, heads=2, kv_heads=2, head_dim=2, rngs=nnx.Rngs(0)
            )
