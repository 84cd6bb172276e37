"""Drawn drafts leave the target's distribution as it is: exactly by enumeration, and by chi-square over many rows."""

from itertools import pairwise, permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2
from support.cells import some_of

from lin_jax.decoding.acceptance.rejection import accept_drawn
from lin_jax.decoding.drafting.tree import DraftTree, chain
from lin_jax.decoding.engine.sampling import Sampling, choose_tokens, draw_children

V, ROWS = 5, 30_000
SEED = jnp.uint32(7)
BRANCHED = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
WIDE = DraftTree(((0,), (1,), (2,), (1, 0), (1, 1), (1, 2)))

accept = jax.jit(accept_drawn, static_argnames="tree")
draw = jax.jit(draw_children, static_argnames=("count", "nodes"))


def normalised(table: np.ndarray) -> np.ndarray:
    return table / table.sum(-1, keepdims=True)


def tables(case: str) -> tuple[np.ndarray, np.ndarray]:
    """The target's and the drafter's distribution after each token, `[V, V]`."""
    rng = np.random.default_rng(5)
    p, q = rng.dirichlet(np.ones(V), V), rng.dirichlet(np.ones(V), V)
    mask = np.array([[(i + j) % 5 < 3 for j in range(V)] for i in range(V)])
    if case == "equal":
        q = p
    elif case == "opposite":
        p = normalised(np.arange(1.0, V + 1) ** 2 * np.ones((V, 1)))
        q = p[:, ::-1]
    elif case == "q_zeros":
        q = normalised(q * mask)
    elif case == "q_certain":
        q = np.eye(V)[np.arange(V) - 1]
    elif case == "p_zeros":
        p = normalised(p * mask)
    elif case == "disjoint":
        p, q = normalised(p * mask), normalised(q * ~mask)
    else:
        assert case == "different"
    return p, q


def logarithms(probabilities: np.ndarray) -> jax.Array:
    return jnp.log(jnp.asarray(probabilities, jnp.result_type(float)))


def is_compatible(observed: np.ndarray, probabilities: np.ndarray) -> bool:
    """A chi-square test at the 0.999 quantile; cells that expect little are taken together."""
    expected = observed.sum() * probabilities
    if observed[expected == 0].any():
        return False
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return bool(((observed - expected) ** 2 / expected).sum() < chi2.ppf(0.999, max(len(expected) - 1, 1)))


def grow(root: jax.Array, positions: jax.Array, log_q: jax.Array, tree: DraftTree, drawn: bool) -> tuple:
    """Tokens of a tree, node by node, and the distributions that they were drawn from."""
    tokens, rows = [root] + [None] * (tree.size - 1), jnp.arange(len(root))
    used = []
    for node in sorted(set(tree.parents) - {-1}):
        children = [child for child, parent in enumerate(tree.parents) if parent == node]
        used.append(log_q[jnp.maximum(tokens[node], 0)])
        if drawn:
            found = draw(used[-1][:, None], len(children), positions, rows, (node,), SEED)[:, 0]
        else:
            found = jax.lax.top_k(used[-1], len(children))[1]
        for order, child in enumerate(children):
            tokens[child] = jnp.where(tokens[node] >= 0, found[:, order], -1)
    return jnp.stack(tokens, axis=1), jnp.stack(used, axis=1)


def decode(p: np.ndarray, q: np.ndarray, tree: DraftTree, count: int, drawn: bool = True) -> np.ndarray:
    """The first `count` tokens `[ROWS, count]` behind token 0, by as many steps as it takes."""
    log_p, log_q, rows = logarithms(p), logarithms(q), jnp.arange(ROWS)
    text, length = np.full((ROWS, count + (tree.depth + 1) * count), -1), np.zeros(ROWS, int)
    root = jnp.zeros(ROWS, jnp.int32)
    for _ in range(count):
        positions = jnp.asarray(3 + length)
        tokens, used = grow(root, positions, log_q, tree, drawn)
        accepted = accept(tokens, used, log_p[jnp.maximum(tokens, 0)], positions, rows, SEED, tree)
        check(tokens, accepted, tree)
        for order in range(tree.depth + 1):
            kept = order < np.asarray(accepted.length)
            text[kept, length[kept] + order] = np.asarray(accepted.emitted)[kept, order]
        length += np.asarray(accepted.length)
        root = accepted.emitted[:, -1]
    return text[:, :count]


def check(tokens: jax.Array, accepted: tuple, tree: DraftTree) -> None:
    """The path goes from parent to child, its tokens are emitted, and both ends are repeated."""
    tokens, path, length, emitted = (np.asarray(part) for part in (tokens, *accepted))
    parents = np.array(tree.parents)
    order = np.arange(tree.depth + 1)
    assert path.shape == emitted.shape == (len(tokens), tree.depth + 1)
    assert ((length >= 1) & (length <= tree.depth + 1)).all()
    assert (path[:, 0] == 0).all()
    for before, after in pairwise(order):
        inside = after < length
        assert (parents[path[inside, after]] == path[inside, before]).all()
        assert (emitted[inside, before] == tokens[inside, path[inside, after]]).all()
        assert (path[~inside, after] == path[~inside, before]).all()
        assert (emitted[~inside, after] == emitted[~inside, before]).all()


CASES = ["different", "equal", "opposite", "q_zeros", "q_certain", "p_zeros", "disjoint"]


@pytest.mark.parametrize(
    "tree",
    [BRANCHED, *(pytest.param(tree, marks=pytest.mark.thorough) for tree in (WIDE, chain(2)))],
    ids=["branched", "wide", "chain"],
)
@pytest.mark.parametrize("case", some_of(CASES, 3))
def test_two_tokens_follow_the_target(case: str, tree: DraftTree) -> None:
    p, q = tables(case)
    text = decode(p, q, tree, 2)
    assert is_compatible(np.bincount(text[:, 0], minlength=V), p[0])
    pairs = np.bincount(text[:, 0] * V + text[:, 1], minlength=V * V)
    assert is_compatible(pairs, (p[0][:, None] * p).ravel())


def test_the_test_finds_a_biased_sampler() -> None:
    p, q = tables("different")
    text = decode(p, q, BRANCHED, 2, drawn=False)
    assert not is_compatible(np.bincount(text[:, 0], minlength=V), p[0])


def emission(p: np.ndarray, q: np.ndarray, children: tuple[int, ...]) -> np.ndarray:
    """The distribution `[V]` of the token after a node with the given children, by the rule's own words."""
    result, reached, q = np.zeros(V), 1.0, q.copy()
    for child in children:
        if child < 0:
            continue
        stands = min(1.0, p[child] / q[child])
        result[child] += reached * stands
        reached *= 1 - stands
        left = np.maximum(p - q, 0)
        p = left / left.sum() if left.sum() > 1e-15 else p
        q[child] = 0
        q = q / q.sum() if q.sum() else q
    return result + reached * p


def chance_of_draw(q: np.ndarray, draws: tuple[int, ...]) -> float:
    """Probability of drawing these tokens in this order, without replacement."""
    chance, rest = 1.0, 1.0
    for token in draws:
        chance, rest = chance * q[token] / rest, rest - q[token]
    return chance


@pytest.mark.parametrize("case", ["different", "opposite", "p_zeros"])
def test_enumerated(case: str) -> None:
    p, q = (table[0] for table in tables(case))
    draws = list(permutations(range(V), 2))
    joint = np.array([chance_of_draw(q, pair) * emission(p, q, pair) for pair in draws])
    np.testing.assert_allclose(joint.sum(0), p, atol=1e-12)

    tree, rows, positions = DraftTree(((0,), (1,))), jnp.arange(ROWS), jnp.full(ROWS, 4)
    tokens, used = grow(jnp.zeros(ROWS, jnp.int32), positions, logarithms(tables(case)[1]), tree, drawn=True)
    log_p = jnp.broadcast_to(logarithms(p), (ROWS, 3, V))
    emitted = np.asarray(accept(tokens, used, log_p, positions, rows, SEED, tree).emitted)[:, 0]
    drawn = np.array([draws.index((one, other)) for one, other in np.asarray(tokens)[:, 1:].tolist()])
    assert is_compatible(np.bincount(drawn, minlength=len(draws)), joint.sum(1))
    assert is_compatible(np.bincount(drawn * V + emitted, minlength=joint.size), joint.ravel())


@pytest.mark.parametrize("children", [(-1, 2, 0), (3, -1, 1), (-1, -1, 4), (1, 4, -1), (0, 2, 3)])
def test_missing_drafts_change_nothing(children: tuple[int, ...]) -> None:
    p, q = (table[0] for table in tables("different"))
    tree, rows = DraftTree(((0,), (1,), (2,))), jnp.arange(ROWS)
    tokens = jnp.broadcast_to(jnp.asarray([0, *children]), (ROWS, 4))
    log_q, log_p = (jnp.broadcast_to(logarithms(each), (ROWS, n, V)) for each, n in ((q, 1), (p, 4)))
    accepted = accept(tokens, log_q, log_p, jnp.full(ROWS, 9), rows, SEED, tree)
    check(tokens, accepted, tree)
    assert is_compatible(np.bincount(np.asarray(accepted.emitted)[:, 0], minlength=V), emission(p, q, children))


@pytest.mark.parametrize("tree", [DraftTree(), BRANCHED], ids=["root", "nothing drafted"])
def test_without_drafts_it_is_plain_sampling(tree: DraftTree, x64: None) -> None:
    count = 300
    logits = jnp.log(jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(V), (count, tree.size))))
    rows, positions = jnp.arange(count), jnp.arange(count) % 7
    tokens = jnp.full((count, tree.size), -1).at[:, 0].set(0)
    log_q = jnp.zeros((count, 3 if tree.paths else 0, V))
    accepted = accept(tokens, log_q, logits, positions, rows, SEED, tree)
    plain = choose_tokens(logits[:, :1], positions[:, None], rows, SEED, Sampling(1.0))
    assert accepted.length.tolist() == [1] * count
    assert accepted.emitted[:, 0].tolist() == plain[:, 0].tolist()


def test_an_equal_drafter_is_always_right() -> None:
    p, _ = tables("equal")
    text = jnp.zeros(ROWS, jnp.int32)
    tokens, used = grow(text, jnp.zeros(ROWS, int), logarithms(p), BRANCHED, drawn=True)
    log_p = logarithms(p)[jnp.maximum(tokens, 0)]
    accepted = accept(tokens, used, log_p, jnp.zeros(ROWS, int), jnp.arange(ROWS), SEED, BRANCHED)
    assert set(accepted.length.tolist()) == {3}
    # The same up to rounding, in a distribution of many tokens.
    many = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (64, 1, 4096)))
    drafts = draw(many, 2, jnp.zeros(64, int), jnp.arange(64), (0,), SEED)[:, 0]
    tree = DraftTree(((0,), (1,)))
    nudged = jnp.broadcast_to(many * (1 + 1e-7), (64, 3, 4096))
    tokens = jnp.pad(drafts, ((0, 0), (1, 0)))
    accepted = accept(tokens, many, nudged, jnp.zeros(64, int), jnp.arange(64), SEED, tree)
    assert set(accepted.length.tolist()) == {2}
    assert accepted.emitted[:, 0].tolist() == drafts[:, 0].tolist()


def test_draws_are_without_replacement() -> None:
    q = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    log_q = jnp.broadcast_to(logarithms(q), (ROWS, 2, V))
    where = (jnp.zeros(ROWS, int), jnp.arange(ROWS))
    drawn = np.asarray(draw(log_q, 6, *where, (0, 3), SEED))
    assert drawn.shape == (ROWS, 2, 6)
    assert (np.sort(drawn, axis=-1) == [-1, -1, 0, 2, 3, 4]).all()
    assert (drawn[..., 4:] == -1).all()
    triples = list(permutations(range(V), 3))
    for node in range(2):
        found = np.array([triples.index(tuple(each)) for each in drawn[:, node, :3].tolist()])
        expected = np.array([chance_of_draw(q, triple) for triple in triples])
        assert is_compatible(np.bincount(found, minlength=len(triples)), expected)
    both = np.bincount(drawn[:, 0, 0] * V + drawn[:, 1, 0], minlength=V * V)
    assert is_compatible(both, (q[:, None] * q).ravel())
    alone = draw(log_q[:, :1], 6, *where, (3,), SEED)
    np.testing.assert_array_equal(np.asarray(alone)[:, 0], drawn[:, 1])
