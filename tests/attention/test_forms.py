"""The forms of every token mixer agree with a float64 loop and with each other, over random shapes."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.oracle import Oracle

from lin_jax.attention import (
    QKV,
    REGISTRY,
    AttentionConfig,
    build_mixer,
    gather_nodes,
    packed_rows,
    padded_rows,
    tree_arrays,
    whole_rows,
)
from lin_jax.attention.augmentation import WrappedState
from lin_jax.attention.full import CacheState
from lin_jax.attention.linformer import LinformerState
from lin_jax.attention.sliding import RingCache
from lin_jax.attention.windowed_state import WindowedState, held
from lin_jax.attention.yoso import YosoAttention
from pallas_kernels.augmented_attention import augmented_attention_reference

AUGMENTED = (
    "augmented",
    "flash_local+convolution",
    "linear_angular+convolution",
    "square+convolution",
    *(f"{base}+local+convolution" for base in ("softmax", "linformer", "transnormer", "rfa")),
)
WINDOWED = (
    "exponential+window",
    "exponential+window+convolution/window=5",
    "exponential+window/window=1",
    "clustered+window/window=6/decay=constant",
    "hedgehog+window/window=9/decay=token",
    "relu+window/window_groups=2/decay=constant",
    "performer+window/window_groups=0",
    "augmented/decay=token",
    "flash_global/decay=constant",
    "relu+local/decay=constant",
    "rfa/decay=constant",
    "elu/decay=token",
    # Sinks: in the same group as what leaves the window, in several groups, of a window shorter than they are.
    "exponential+window+convolution/window=5/sinks=3",
    "hedgehog+window/decay=token/sinks=2",
    "relu+window/window_groups=0/decay=constant/sinks=11",
    "hedgehog+window/window=1/decay=token/sinks=4",
    "softmax/window=5/sinks=3",
    "softmax/window=1/sinks=1",
)
NAMES = (*REGISTRY, *AUGMENTED, *WINDOWED)
pytestmark = pytest.mark.usefixtures("x64")


@dataclass
class Case:
    """A mixer of random sizes with random parameters, and random inputs for it."""

    name: str
    layer: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.layer, NAMES.index(self.name)])
        self.kv_heads, share = (int(n) for n in self.rng.integers(1, 3, 2))
        self.heads = self.kv_heads * share
        self.size = int(self.rng.choice([2, 4, 6]))
        self.group_size = int(self.rng.integers(3, 9))
        self.length = int(self.rng.integers(20, 40))
        name, *options = self.name.split("/")
        chosen = {key: value if key == "decay" else int(value) for key, value in (o.split("=") for o in options)}
        self.config = AttentionConfig(
            name,
            self.group_size,
            int(2 * self.rng.integers(0, 8) + 1),
            initial_alpha=0.7,
            features=8,
            rank=2,
            hashes=3,
            hash_bits=2,
            **chosen,
        )

    @cached_property
    def mixer(self) -> Any:
        mixer = build_mixer(
            self.config,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.size,
            layer=self.layer,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(self.layer),
        )
        for _, parameter in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
            parameter[...] = parameter[...] + jnp.asarray(self.rng.normal(size=parameter.shape)) / 2
        return mixer

    def inputs(self, batch: int, length: int) -> QKV:
        shapes = [(batch, length, heads, self.size) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return QKV(*(self.rng.normal(size=shape) for shape in shapes))

    def reference(self, *inputs: np.ndarray, parents: np.ndarray | None = None, tables: bool = True) -> np.ndarray:
        return Oracle(self.config, self.mixer, self.layer, tables=tables).causal(*inputs, parents=parents)

    def state(self, batch: int) -> Any:
        return self.mixer.init_state(batch, 128, jnp.float64)

    @property
    def expects(self) -> bool:
        """Whether whole rows without a state are an expectation of what a state gives."""
        return isinstance(getattr(self.mixer, "base", self.mixer), YosoAttention)


# One of each kind; what others add to them is in `make test-all`.
ALWAYS = (
    "augmented",
    "linformer",
    "exponential+window+convolution/window=5",
    "hedgehog+window/decay=token/sinks=2",
    "softmax/window=5/sinks=3",
)


@pytest.fixture(
    params=cells(
        [(name, 0) for name in ALWAYS],
        [(("transnormer", 1),), *(((name, 0),) for name in NAMES if name not in ALWAYS)],
    ),
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


@partial(jax.jit, static_argnames="aligned")
def whole(mixer: Any, inputs: QKV, aligned: bool = True) -> jax.Array:
    batch, length = inputs.keys.shape[:2]
    layout = whole_rows(batch, length) if aligned else packed_rows(jnp.ones((batch, length), jnp.int32))
    return mixer.parallel(inputs, layout)[0]


@jax.jit
def piece(mixer: Any, inputs: QKV, lengths: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    return mixer.parallel(inputs, padded_rows(lengths, inputs.keys.shape[1], state.position), state)


@jax.jit
def token_by_token(mixer: Any, inputs: QKV, lengths: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Rows that have come to their end commit nothing more."""

    def step(state: Any, now: tuple[jax.Array, QKV]) -> tuple[Any, jax.Array]:
        place, token = now
        outputs, nodes = mixer.verify(QKV(*(part[:, None] for part in token)), tree_arrays((-1,)), state)
        return mixer.commit(state, nodes, (place < lengths).astype(int)), outputs[:, 0]

    places = jnp.arange(inputs.keys.shape[1])
    state, outputs = jax.lax.scan(step, state, (places, QKV(*(jnp.moveaxis(part, 1, 0) for part in inputs))))
    return jnp.moveaxis(outputs, 0, 1), state


@jax.jit
def whole_and_gradients(mixer: Any, inputs: QKV, cotangent: jax.Array) -> tuple[jax.Array, QKV]:
    outputs, pull = jax.vjp(lambda inputs: whole(mixer, inputs), inputs)
    return outputs, pull(cotangent)[0]


def same_state(case: Case, one: Any, other: Any) -> None:
    """Equal in all that a mixer will ever read; slots that are not in use may hold anything."""
    assert one.position.tolist() == other.position.tolist()
    if isinstance(one, WrappedState):
        same_state(case, one.base, other.base)
        return same_state(case, one.around, other.around)
    size = case.group_size
    used = np.asarray(one.position)[:, None] % size > np.arange(size)
    if isinstance(one, LinformerState):
        same_state(case, one.buffer, other.buffer)
        used = np.asarray(one.position)[:, None] // size > np.arange(one.keys.shape[1])
    elif isinstance(one, CacheState):
        used = np.asarray(one.position)[:, None] > np.arange(one.keys.shape[1])
    elif isinstance(one, WindowedState):
        used = held(case.mixer.window, one.position).mask
    elif isinstance(one, RingCache):
        used = np.asarray(one.position)[:, None] > np.arange(one.keys.shape[1])
    for part in ("memory", "window", "convolved", "sink_keys", "sink_values"):
        if getattr(one, part, None) is not None:
            close(getattr(one, part), getattr(other, part))
    for part in ("keys", "values", "decays"):
        if getattr(one, part, None) is None:
            continue
        mask = np.reshape(used, (*used.shape, *(1,) * (getattr(one, part).ndim - 2)))
        close(*(np.where(mask, getattr(state, part), 0) for state in (one, other)))


@pytest.mark.users_settings("augmented-0")
def test_whole_rows_and_their_gradients(case: Case) -> None:
    inputs = case.inputs(2, case.length)
    expected = np.stack([case.reference(*(part[row] for part in inputs), tables=False) for row in range(2)])
    close(whole(case.mixer, inputs), expected)
    close(whole(case.mixer, inputs, aligned=False), expected)

    cotangent = case.rng.normal(size=expected.shape)
    direction = case.inputs(2, case.length)
    gradients = whole_and_gradients(case.mixer, inputs, cotangent)[1]
    slope = sum(float(np.sum(np.asarray(g) * d)) for g, d in zip(gradients, direction, strict=True))
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = [p + sign * step * d for p, d in zip(inputs, direction, strict=True)]
        ends.append(np.stack([case.reference(*(part[row] for part in moved), tables=False) for row in range(2)]))
    close(slope, np.sum((ends[0] - ends[1]) * cotangent) / (2 * step), 2e-5)


def test_pieces_with_padding_and_single_tokens(case: Case) -> None:
    """Rows of unequal length, cut at different places, go on from a state as if they had been read at once."""
    total = np.array([case.length, max(case.length - 3, 1), 1])
    inputs = case.inputs(3, case.length)
    expected = np.asarray(token_by_token(case.mixer, inputs, np.full(3, case.length), case.state(3))[0])
    close(expected[0], case.reference(*(part[0] for part in inputs)))
    if not case.expects:
        close(expected, whole(case.mixer, inputs))
    width = int(case.rng.integers(1, case.length + 1))
    state, done = case.state(3), np.zeros(3, int)
    while (done < total).any():
        lengths = np.minimum(case.rng.integers(0, width + 1, 3), total - done)
        garbage = QKV(*(1e3 * part for part in case.inputs(3, width)))
        for row, (begin, count) in enumerate(zip(done, lengths, strict=True)):
            for part, source in zip(garbage, inputs, strict=True):
                part[row, :count] = source[row, begin : begin + count]
        outputs, state = piece(case.mixer, garbage, lengths, state)
        outputs = np.asarray(outputs)
        for row, (begin, count) in enumerate(zip(done, lengths, strict=True)):
            close(outputs[row, :count], expected[row, begin : begin + count])
        done += lengths
    same_state(case, state, token_by_token(case.mixer, inputs, total, case.state(3))[1])


def test_packed_documents_and_padding(case: Case) -> None:
    """Documents in one row, with padding on both sides, equal the documents alone, values and gradients."""
    lengths = [int(n) for n in case.rng.integers(1, 20, 2)]
    lengths.append(lengths[0])
    parts = [case.inputs(1, n) for n in lengths]
    left, right = (case.inputs(1, int(n)) for n in case.rng.integers(1, 5, 2))
    segment_ids = np.concatenate(
        [np.zeros(left[0].shape[1]), *(np.full(n, 7 - i) for i, n in enumerate(lengths)), np.zeros(right[0].shape[1])]
    )[None].astype(np.int32)
    row = QKV(*(np.concatenate([1e3 * l, *p, 1e3 * r], axis=1) for l, r, *p in zip(left, right, *parts, strict=True)))  # noqa: E741
    valid = jnp.asarray(segment_ids > 0)[..., None, None]
    mixer = case.mixer

    @jax.jit
    def packed(inputs: QKV, cotangent: jax.Array) -> tuple[jax.Array, QKV]:
        def outputs(inputs: QKV) -> jax.Array:
            return jnp.where(valid, mixer.parallel(inputs, packed_rows(jnp.asarray(segment_ids)))[0], 0)

        result, pull = jax.vjp(outputs, inputs)
        return result, pull(cotangent)[0]

    cotangent = case.rng.normal(size=row[0].shape)
    outputs, gradients = jax.tree.map(np.asarray, packed(row, cotangent))
    begin = left[0].shape[1]
    for part, length in zip(parts, lengths, strict=True):
        here = slice(begin, begin + length)
        alone, pulled = whole_and_gradients(mixer, part, cotangent[:, here])
        close(outputs[:, here], alone)
        for found, expected in zip(gradients, pulled, strict=True):
            close(found[:, here], expected)
        begin += length


def random_tree(rng: np.random.Generator, count: int, depth: int) -> tuple[int, ...]:
    parents, depths = [-1], [0]
    while len(parents) < count:
        parent = int(rng.choice([n for n, d in enumerate(depths) if d < depth]))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return tuple(parents)


def test_tree_on_a_state(case: Case) -> None:
    """Every node equals the sequence that leads to it, with rows standing before, at and after ends of groups."""
    batch, size = 4, 7
    parents = random_tree(case.rng, size, max(min(case.group_size - 1, 4), 1))
    consumed = case.rng.integers(0, 3 * case.group_size, batch)
    consumed[0] = 2 * case.group_size - 1
    consumed[1] = 2 * case.group_size
    before = case.inputs(batch, int(consumed.max()))
    nodes = case.inputs(batch, size)
    state = piece(case.mixer, before, jnp.asarray(consumed), case.state(batch))[1]
    untouched = jax.tree.map(np.asarray, state)
    outputs, _ = jax.jit(lambda mixer, inputs, state: mixer.verify(inputs, tree_arrays(parents), state))(
        case.mixer, nodes, state
    )
    for row, count in enumerate(consumed):
        joined = tuple(np.concatenate([b[row, :count], n[row]]) for b, n in zip(before, nodes, strict=True))
        chain = [*range(-1, count - 1), *(count - 1 if p < 0 else count + p for p in parents)]
        close(outputs[row], case.reference(*joined, parents=np.array(chain))[count:])
    jax.tree.map(np.testing.assert_array_equal, untouched, state)


def test_commit_is_plain_decoding_to_the_bit(case: Case) -> None:
    """Paths of any length, none included, leave the bits that committing node by node leaves, in float32."""
    batch, width = 5, case.group_size
    commit = jax.jit(lambda mixer, state, path, length: mixer.commit(state, path, length))
    start = case.rng.integers(0, 2 * case.group_size, batch)
    narrow = QKV(*(part.astype(np.float32) for part in case.inputs(batch, int(start.max()) + 1)))
    state = case.mixer.init_state(batch, 128, jnp.float32)
    tree = tree_arrays(tuple(range(-1, width - 1)))
    needs = jax.jit(lambda mixer, inputs, state: mixer.verify(inputs, tree, state)[1])
    for t in range(int(start.max())):
        step = jax.tree.map(lambda part, t=t: part[:, :1], needs(case.mixer, chain(narrow, t, width), state))
        state = commit(case.mixer, state, step, jnp.asarray(t < start, int))
    once = stepped = state
    for _ in range(4):
        lengths = case.rng.integers(0, width + 1, batch)
        inputs = QKV(*(jnp.asarray(part.astype(np.float32)) for part in case.inputs(batch, width)))
        path = needs(case.mixer, inputs, once)
        once = commit(case.mixer, once, path, jnp.asarray(lengths))
        for t in range(width):
            single = gather_nodes(path, jnp.full((batch, 1), t))
            stepped = commit(case.mixer, stepped, single, jnp.asarray(t < lengths, int))
        jax.tree.map(np.testing.assert_array_equal, once, stepped)


def chain(inputs: QKV, begin: int, width: int) -> QKV:
    """`width` tokens from `begin` on, repeating the last one at the end."""
    return QKV(*(part[:, np.minimum(np.arange(begin, begin + width), part.shape[1] - 1)] for part in inputs))


def test_bfloat16_is_close_and_its_state_float32(case: Case) -> None:
    """Within 0.03 of the largest output of float64 on the same, rounded inputs."""
    narrow = QKV(*(jnp.asarray(part, jnp.bfloat16) for part in case.inputs(1, case.length)))
    exact = case.reference(*(np.asarray(part[0], np.float64) for part in narrow))[None]
    state = case.mixer.init_state(1, 64, jnp.bfloat16)
    outputs, state = piece(case.mixer, narrow, jnp.asarray([case.length]), state)
    assert outputs.dtype == jnp.bfloat16
    for path, leaf in jax.tree.leaves_with_path(state):
        if "memory" in jax.tree_util.keystr(path):
            assert leaf.dtype == jnp.float32
    scale = float(np.abs(exact).max())
    close(np.asarray(outputs, np.float64) / scale, exact / scale, 0.03)


def test_the_definition_of_the_kernels_is_the_same() -> None:
    """The oracle of all attentions and the reference of augmented attention, on a sequence that branches."""
    case = Case("augmented")
    inputs = tuple(part[0] for part in case.inputs(1, 25))
    parents = np.array([*range(-1, 17), *(17 + parent for parent in random_tree(case.rng, 8, 4)[1:])])
    expected = augmented_attention_reference(
        *inputs,
        group_size=case.group_size,
        alpha=float(case.mixer.alpha[0]),
        taps=np.asarray(case.mixer.convolution.taps[...]),
        parents=parents,
    )
    close(case.reference(*inputs, parents=parents), expected)
