"""The path head against slow loops in NumPy, and what it begins as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig, tree_arrays
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig, PathHead, SeparateLayers

E, D, V = 12, 8, 19
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=E,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    attention=AttentionConfig(group_size=4, kernel_size=5),
)
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 3, E))
PATH = RNG.integers(0, V, (2, 3, 4))


def random_head(dtype=jnp.float64) -> PathHead:
    """Every parameter random and large enough to matter."""
    head = PathHead(E, D, V, dtype=dtype, rngs=nnx.Rngs(0))
    state, rng = nnx.state(head), np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray((path[-1] == "scale") + rng.normal(scale=0.5, size=leaf.shape), dtype))
    nnx.update(head, state)
    return head


def model(dtype: str = "float64", *, tied: bool = False) -> Llama:
    """Embeddings and head far from each other, and a last norm whose scales are not one."""
    options = vars(CONFIG) | {"dtype": dtype, "param_dtype": dtype, "tie_embeddings": tied, "initializer_range": 0.5}
    made = Llama(LlamaConfig(**options), rngs=nnx.Rngs(0))
    made.norm.scale[...] = jnp.linspace(0.3, 2.0, E).astype(dtype)
    return made


def slow_logits(head: PathHead, hidden: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Logits `[K, V]` along one path, number by number."""
    p, e, a, b, c, o = (
        np.asarray(part[...], np.float64)
        for part in (head.projection, head.embedding, head.inner, head.bias, head.outer, head.output)
    )
    scale = np.asarray(head.norm.scale[...], np.float64)
    state = [sum(hidden[i] * p[i, j] for i in range(p.shape[0])) for j in range(p.shape[1])]
    rows = []
    for token in path:
        size = np.sqrt(sum(x * x for x in state) / len(state) + 1e-5)
        heard = [x / size * s for x, s in zip(state, scale, strict=True)] + list(e[token])
        sums = [sum(heard[i] * a[i, j] for i in range(len(heard))) + b[j] for j in range(len(b))]
        inner = [x / (1 + np.exp(-x)) for x in sums]
        state = [state[j] + sum(inner[i] * c[i, j] for i in range(len(inner))) for j in range(len(state))]
        rows.append([sum(state[j] * o[j, v] for j in range(len(state))) for v in range(o.shape[1])])
    return np.array(rows)


def test_guesses_against_a_slow_loop(x64):
    head = random_head()
    expected = [[slow_logits(head, HIDDEN[i, j], PATH[i, j]) for j in range(3)] for i in range(2)]
    found = jax.jit(PathHead.guess)(head, HIDDEN, PATH)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_steps_lead_to_the_same_guesses_whatever_the_batch(x64):
    """Every row alone, token by token, gives what all rows give in one piece."""
    head = random_head()
    whole = jax.jit(PathHead.guess)(head, HIDDEN, PATH)
    step = jax.jit(PathHead.step)
    for i, j in np.ndindex(2, 3):
        state = head.begin(jnp.asarray(HIDDEN[i, j]))
        for depth, token in enumerate(PATH[i, j]):
            state = step(head, state, jnp.asarray(token))
            np.testing.assert_allclose(head.logits(state), whole[i, j, depth], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_of_full_width_it_begins_as_the_models_own_head(tied, x64):
    base = model(tied=tied)
    head = PathHead.on(base, E, nnx.Rngs(0))
    hidden = base.hidden(jnp.asarray(PATH[0]))
    np.testing.assert_allclose(head.logits(head.begin(hidden)), base.logits(hidden), rtol=1e-9, atol=1e-9)
    # The first steps say nearly the same: the cell's own part is small.
    state = head.begin(hidden)
    change = head.step(state, jnp.asarray(PATH[0])) - state
    assert 0 < float(jnp.abs(change).mean()) < 0.2 * float(jnp.abs(state).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_of_lower_width_it_begins_as_the_nearest_of_that_rank(tied, x64):
    """Eckart and Young: no product of rank D is nearer to the model's head than the truncated one."""
    base = model(tied=tied)
    head = PathHead.on(base, D, nnx.Rngs(0))
    kernel = np.asarray(base.embed.embedding[...].T if tied else base.head.kernel[...])
    u, sizes, v = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(
        np.asarray(head.projection[...]) @ np.asarray(head.output[...]), (u[:, :D] * sizes[:D]) @ v[:D], atol=1e-9
    )
    table = np.asarray(base.embed.embedding[...])
    own = np.asarray(head.embedding[...])
    np.testing.assert_allclose(np.mean(own**2), 1, rtol=1e-9)
    u, sizes, _ = np.linalg.svd(table, full_matrices=False)
    between = (u[:, :D] * sizes[:D]) @ (u[:, :D] * sizes[:D]).T
    np.testing.assert_allclose(own @ own.T, between * len(own) * D / np.trace(between), atol=1e-9)


@pytest.mark.parametrize("dtype", cells(["bfloat16"], ["float32"]))
def test_narrow_numbers(dtype):
    base = model(dtype)
    head = PathHead.on(base, D, nnx.Rngs(0))
    assert (head.hidden_size, head.width, head.vocab_size) == (E, D, V)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(head))} == {jnp.dtype(dtype)}
    hidden = jnp.asarray(HIDDEN, dtype)
    logits = head.guess(hidden, jnp.asarray(PATH))
    assert (logits.shape, logits.dtype) == ((2, 3, 4, V), jnp.float32)
    close = 1e-4 if dtype == "float32" else 0.2
    np.testing.assert_allclose(logits[0, 0], slow_logits(head, np.asarray(hidden[0, 0]), PATH[0, 0]), atol=close)


@pytest.mark.parametrize("width", [0, E + 1])
def test_a_width_that_does_not_fit(width):
    with pytest.raises(UserError, match=f"heads.width {width} does not fit a model of width {E}; give 1 to {E}"):
        PathHead.on(model("float32"), width, nnx.Rngs(0))


def test_outputs_of_several_layers_begin_its_state(x64):
    """Behind the last layer's vector stand others, each divided by its root mean square; a slow loop fuses them."""
    layers, head = (0, 3), PathHead(E, D, V, layers=(0, 3), dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    head.projection[...] = jnp.asarray(rng.normal(size=(3 * E, D)))
    assert (head.hidden_size, head.width, head.vocab_size, head.guessed) == (E, D, V, V)
    hidden = 5 * rng.normal(size=(2, 3 * E))
    for row, state in zip(hidden, head.begin(jnp.asarray(hidden)), strict=True):
        parts = [row[:E]]
        for number in range(len(layers)):
            own = row[(number + 1) * E : (number + 2) * E]
            parts.append(own / np.sqrt(sum(x * x for x in own) / E + 1e-5))
        np.testing.assert_allclose(state, np.concatenate(parts) @ np.asarray(head.projection[...]), rtol=1e-9)
    with pytest.raises(UserError, match=r"reads layers \[0, 3\] .* was given 12 numbers; give the model aux_layers"):
        head.begin(jnp.asarray(hidden[:, :E]))


@pytest.mark.parametrize("separate", cells([False], [True]))
def test_a_model_gives_the_outputs_of_its_layers(separate, x64):
    """Those of a model that ends there, without the norm; in whole texts, in trees, and beside the same last vector."""
    options = vars(CONFIG) | {"dtype": "float64", "param_dtype": "float64", "num_layers": 3, "initializer_range": 0.5}
    base = Llama(LlamaConfig(**options), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(PATH[0])
    last = base.hidden(tokens)
    ends = []
    for count in (1, 2):
        cut = base.with_layers(range(count))
        cut.norm = lambda x: x
        ends.append(cut.hidden(tokens))
    if separate:
        base.layers = SeparateLayers.of(base.layers)
    base.aux_layers = (0, 1)
    assert base.hidden_width == 3 * E
    whole = base.hidden(tokens)
    np.testing.assert_allclose(whole, np.concatenate([last, *ends], axis=-1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(base.logits(whole), base.logits(last), rtol=1e-9)
    chain = tree_arrays(tuple(range(-1, tokens.shape[1] - 1)))
    for same_bits in {False, separate}:
        base.same_bits = same_bits
        nodes, _ = base.verify(tokens, chain, base.init_state(len(tokens), 8))
        np.testing.assert_allclose(nodes, whole, rtol=1e-9, atol=1e-9)
    assert base.with_layers([2]).hidden_width == E


def test_a_trimmed_vocabulary_guesses_as_the_whole_one(x64):
    """The same logits for the tokens that it has, and none for others."""
    base, tokens = model(), (0, 3, 4, 11, 18)
    whole, few = PathHead.on(base, D, nnx.Rngs(0)), PathHead.on(base, D, nnx.Rngs(0), tokens=tokens)
    assert (few.vocab_size, few.guessed) == (V, len(tokens))
    hidden, path = jnp.asarray(HIDDEN), jnp.asarray(PATH)
    expected, found = whole.guess(hidden, path), few.guess(hidden, path)
    np.testing.assert_allclose(found[..., tokens], expected[..., tokens], rtol=1e-9, atol=1e-12)
    assert np.isneginf(np.delete(np.asarray(found), tokens, axis=-1)).all()
    np.testing.assert_array_equal(
        few.named(jnp.argmax(few.unrolled(hidden, path), axis=-1)), jnp.argmax(found, axis=-1)
    )
