"""Softmax over a window, in every form, against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention import (
    QKV,
    AttentionConfig,
    BidirectionalMixer,
    build_mixer,
    gather_nodes,
    has_growing_state,
    masked_rows,
    max_draft_depth,
    packed_rows,
    padded_rows,
    tree_arrays,
    whole_rows,
)
from lin_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("x64")
HEADS, KV_HEADS, SIZE, WINDOW = 2, 1, 4, 5
# Deeper than the window: a deep node no longer sees the root.
PARENTS = (-1, 0, 1, 2, 3, 4, 5, 1, 0)
PATH = (0, 1, 2, 3, 4, 5, 6)


def mixer_of(window: int = WINDOW):
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE}
    return build_mixer(AttentionConfig("softmax", window=window), **sizes, rngs=None)


def drawn(*lead: int, seed: int = 0) -> QKV:
    rng = np.random.default_rng(seed)
    return QKV(*(jnp.asarray(rng.normal(size=(*lead, heads, SIZE))) for heads in (HEADS, KV_HEADS, KV_HEADS)))


def part(qkv: QKV, *index) -> QKV:
    return QKV(*(each[index] for each in qkv))


def oracle(qkv: QKV, pasts: list[list[int]], keys: QKV | None = None) -> np.ndarray:
    """Outputs `[T, H, E]`: of each query, over the tokens whose numbers are given, and no others."""
    queries = np.asarray(qkv.queries)
    keys_, values = (np.asarray(each) for each in (keys or qkv)[1:])
    out = np.zeros((len(pasts), HEADS, SIZE))
    for t, past in enumerate(pasts):
        for head in range(HEADS):
            scores = np.array([queries[t, head] @ keys_[s, 0] / SIZE**0.5 for s in past])
            weights = np.exp(scores - scores.max()) if past else scores
            for weight, s in zip(weights, past, strict=True):
                out[t, head] += weight / weights.sum() * values[s, 0]
    return out


def last(t: int, window: int = WINDOW, first: int = 0) -> list[int]:
    return list(range(max(first, t - window + 1), t + 1))


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [4, 23, 150])
def test_whole_rows_and_their_gradients(length: int) -> None:
    """Rows within the window, of one matrix of pairs, and in chunks."""
    qkv, mixer = drawn(1, length), mixer_of()
    seen = jnp.asarray(np.tri(length, dtype=bool) & ~np.tri(length, k=-WINDOW, dtype=bool))

    def plain(qkv: QKV):
        scores = jnp.einsum("bthd,bskd->bhts", qkv.queries, qkv.keys) / SIZE**0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("bhts,bskd->bthd", weights, qkv.values)

    def both(forward):
        def weighted(qkv: QKV):
            found = forward(qkv)
            return jnp.sum(found * jnp.cos(jnp.arange(found.size).reshape(found.shape))), found

        return jax.jit(jax.value_and_grad(weighted, has_aux=True))(qkv)

    (_, found), gradients = both(lambda qkv: mixer.parallel(qkv, whole_rows(1, length))[0])
    (_, again), expected = both(plain)
    close(found[0], oracle(part(qkv, 0), [last(t) for t in range(length)]))
    close(found, again)
    jax.tree.map(close, gradients, expected)


@pytest.mark.parametrize("length", [20, 140])
def test_documents_and_padding(length: int) -> None:
    qkv, mixer = drawn(1, length), mixer_of()
    segment_ids = np.repeat([1, 2, 3, 0], [7, length - 14, 4, 3])
    mask = np.arange(length) % 5 != 2
    packed, masked = jax.jit(
        lambda qkv: (
            mixer.parallel(qkv, packed_rows(jnp.asarray(segment_ids)[None]))[0][0],
            mixer.parallel(qkv, masked_rows(jnp.asarray(mask)[None]))[0][0],
        )
    )(qkv)
    assert np.isfinite(packed).all()
    begins = np.searchsorted(segment_ids[:-3], segment_ids[:-3])
    close(packed[:-3], oracle(part(qkv, 0), [last(t, first=begins[t]) for t in range(length - 3)]))
    pasts = [[s for s in last(t) if mask[s]] for t in range(length)]
    close(masked[mask], oracle(part(qkv, 0), pasts)[mask])


@pytest.mark.parametrize("lengths", [(1, 3), (70, 2000)])
def test_pieces_then_a_deep_tree_then_a_step(lengths: tuple[int, int]) -> None:
    """On a ring that has room, and on one that was written over many times; the ring stays as large as it is."""
    mixer, total = mixer_of(), sum(lengths) + 2
    row, nodes, step = drawn(1, total), drawn(1, len(PARENTS), seed=1), drawn(1, 1, seed=2)
    counts = (lengths[0], lengths[1])

    @jax.jit
    def run(row, nodes, step):
        state, outputs, begin = mixer.init_state(1, total, jnp.float64), [], 0
        for count in counts:
            piece = part(row, np.s_[:], np.s_[begin : begin + count + 2])  # Two tokens of padding behind.
            layout = padded_rows(jnp.array([count]), count + 2, state.position)
            found, state = mixer.parallel(piece, layout, state)
            outputs.append(found[0, :count])
            begin += count
        tree = tree_arrays(PARENTS)
        verified, kept = mixer.verify(nodes, tree, state)
        path = gather_nodes(kept, jnp.asarray([PATH]))
        committed = [mixer.commit(state, path, jnp.array([count])) for count in (0, 2, len(PATH))]
        root = tree_arrays((-1,))
        return (
            jnp.concatenate(outputs),
            verified[0],
            [mixer.verify(step, root, each)[0][0] for each in committed],
            state,
        )

    outputs, verified, steps, state = run(row, nodes, step)
    known = sum(counts)
    close(outputs, oracle(part(row, 0), [last(t) for t in range(known)]))
    assert state.keys.shape == (1, WINDOW, KV_HEADS, SIZE)
    together = QKV(*(np.concatenate([a[0, :known], b[0], c[0]]) for a, b, c in zip(row, nodes, step, strict=True)))
    above: list[list[int]] = []
    for node, parent in enumerate(PARENTS):
        above.append([*(above[parent] if node else []), node])
    texts = [[*range(known), *(known + each for each in path)] for path in above]
    close(verified, oracle(part(nodes, 0), [text[-WINDOW:] for text in texts], together))
    own = known + len(PARENTS)
    for count, found in zip((0, 2, len(PATH)), steps, strict=True):
        text = [*range(known), *(known + node for node in PATH[:count]), own]
        close(found, oracle(part(step, 0), [text[-WINDOW:]], together))


def test_the_state_of_the_last_document() -> None:
    """Packed rows on a ring: the first document goes on, and the ring after them is of the last."""
    mixer, first, row, step = mixer_of(), drawn(1, 6), drawn(1, 9, seed=1), drawn(1, 1, seed=2)

    @jax.jit
    def run(first, row, step):
        _, state = mixer.parallel(first, whole_rows(1, 6), mixer.init_state(1, 0, jnp.float64))
        layout = packed_rows(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]]), state.position)
        found, after = mixer.parallel(row, layout, state)
        return found[0], after.position, mixer.verify(step, tree_arrays((-1,)), after)[0][0]

    found, position, stepped = run(first, row, step)
    assert position == 4
    together = QKV(*(np.concatenate([a[0], b[0], c[0]]) for a, b, c in zip(first, row, step, strict=True)))
    pasts = [last(t) for t in (6, 7, 8)] + [last(t, first=9) for t in range(9, 13)]
    close(found[:7], oracle(part(row, 0), pasts, together))
    close(stepped, oracle(part(step, 0), [[9, 10, 11, 12, 15][-WINDOW:]], together))


def test_what_is_known_of_it() -> None:
    sliding = AttentionConfig("softmax", window=8)
    assert (max_draft_depth(sliding), has_growing_state(sliding)) == (None, False)
    mix = AttentionConfig("augmented", group_size=16, pattern=["augmented", {"group_size": 8}, "softmax"])
    assert (max_draft_depth(mix), has_growing_state(mix)) == (7, True)
    assert not has_growing_state(AttentionConfig("augmented", layers={1: sliding}))
    with pytest.raises(UserError, match=r"attention\.window 8 is given for bidirectional softmax"):
        build_mixer(sliding, form="bidirectional", heads=1, kv_heads=1, head_dim=4, rngs=None)
    with pytest.raises(UserError, match=r"attention\.window is 0; give at least 1"):
        AttentionConfig("softmax", window=0)
    assert not isinstance(mixer_of(), BidirectionalMixer)
