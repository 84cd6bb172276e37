"""Trees, prompt lookup, acceptance and filters, each against a plain Python version."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import DraftTree, Generator, NgramDrafter, Sampling, chain, parse_tree
from lin_jax.decoding.acceptance import accept
from lin_jax.decoding.ngram import latest_continuation
from lin_jax.decoding.plan import Costs, choose_plan, grow_tree
from lin_jax.decoding.sampling import choose, filter_logits
from lin_jax.decoding.tree import MC_SIM_7B_63
from lin_jax.errors import UserError


def lookup(tokens: list[int], count: int, longest: int) -> list[int]:
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return [-1] * count


def test_prompt_lookup() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 4, n).tolist() for n in (1, 2, 3, 5, 9, 17, 30)] + [[7], [1, 1, 1, 1], [3, 1, 2]]
    table = np.full((len(rows), 40), 3)
    for row, tokens in zip(table, rows, strict=True):
        row[: len(tokens)] = tokens
    found = latest_continuation(jnp.asarray(table), jnp.asarray([len(row) for row in rows]), 5, 3)
    assert found.tolist() == [lookup(row, 5, 3) for row in rows]


def test_acceptance() -> None:
    rng = np.random.default_rng(1)
    tree = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)))
    tokens, targets = rng.integers(0, 2, (50, tree.size)), rng.integers(0, 2, (50, tree.size))
    tokens[rng.random(tokens.shape) < 0.1] = -1
    accepted = accept(jnp.asarray(tokens), jnp.asarray(targets), tree)
    for row in range(50):
        best = [0]
        for path in tree.paths:
            nodes = [0, *(tree.paths.index(path[: d + 1]) + 1 for d in range(len(path)))]
            good = all(tokens[row, b] == targets[row, a] for a, b in pairwise(nodes))
            if good and len(nodes) > len(best):
                best = nodes
        length = int(accepted.length[row])
        assert accepted.path[row, :length].tolist() == best
        assert accepted.emitted[row, :length].tolist() == targets[row, best].tolist()


def test_filters() -> None:
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_k=2))).tolist() == [True, True, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.79))).tolist() == [True, True, False, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.81))).tolist() == [True, True, True, False]
    assert jnp.isfinite(filter_logits(logits, Sampling(1.0, top_p=0.01))).tolist() == [True, False, False, False]


def test_samples_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    count = 20000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (1, count, 4))
    drawn = choose(logits, jnp.arange(count)[None], jnp.zeros(1, int), jnp.uint32(0), Sampling(1.0))
    observed = np.bincount(np.asarray(drawn)[0], minlength=4)
    chi_square = float(((observed - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert chi_square < 16.27  # the 0.999 quantile with three degrees of freedom


def test_grown_tree_is_what_it_claims() -> None:
    rng = np.random.default_rng(2)
    hits = rng.random((300, 3, 4)) < np.array([0.5, 0.2, 0.1, 0.05])
    trees = grow_tree(hits, 9)
    assert [tree.size for tree, _ in trees] == list(range(1, 10))
    for tree, expected in trees:
        reached = [
            max((len(p) for p in tree.paths if all(hit[d, r] for d, r in enumerate(p))), default=0) for hit in hits
        ]
        assert expected == pytest.approx(1 + np.mean(reached))


def test_plan_falls_back_to_plain_decoding() -> None:
    hits = np.random.default_rng(3).random((100, 3, 4)) < 0.2
    steep = Costs((1, 8), (1.0, 30.0), 0.5)
    assert choose_plan("medusa", hits, steep, 4, 3).tree == DraftTree()
    flat = choose_plan("medusa", hits, Costs((1, 8), (1.0, 1.01), 0.01), 4, 3)
    assert flat.tree.size == 8
    assert flat.expected_speedup > 1.3


@pytest.mark.parametrize("text", ["chain:x", "0;0,0,0", "a", "0,-1", ""])
def test_bad_trees(text: str) -> None:
    with pytest.raises(UserError, match="draft tree"):
        parse_tree(text)


def test_tree_names() -> None:
    assert parse_tree("chain:3") == chain(3) == DraftTree(((0,), (0, 0), (0, 0, 0)))
    assert parse_tree("0;1;0,1") == DraftTree(((0,), (1,), (0, 1)))
    assert parse_tree("mc_sim_7b_63") is MC_SIM_7B_63
    assert MC_SIM_7B_63.size == 64


def test_tree_must_fit_group_and_drafter() -> None:
    from flax import nnx

    from lin_jax.models import Llama, LlamaConfig

    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    model = Llama(LlamaConfig(**{**config.__dict__, "attention": AttentionConfig(group_size=4)}), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a group holds 4 tokens"):
        Generator(model, drafter=NgramDrafter(depth=4))
    with pytest.raises(UserError, match="the drafter offers"):
        Generator(model, drafter=NgramDrafter(depth=2), tree=chain(3))
    with pytest.raises(UserError, match="holds no token"):
        Generator(model).generate([[]], 3)


def test_differences_and_rounding_ties() -> None:
    from flax import nnx

    from lin_jax.decoding.agreement import first_difference, is_rounding_tie
    from lin_jax.models import Llama, LlamaConfig

    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    model = Llama(config, rngs=nnx.Rngs(0))
    best = int(jnp.argmax(model(jnp.asarray([[3, 4, 5]]))[0, -1]))
    other = (best + 1) % 11
    assert not is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(), 0)
    assert not is_rounding_tie(model, [3, 4], [5], [5, other], Sampling(), 0)
    kernel = model.head.kernel[...]
    model.head.kernel[...] = kernel.at[:, other].set(kernel[:, best] * (1 + 1e-7))
    assert is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(), 0)
    assert not is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(1.0), 0)
