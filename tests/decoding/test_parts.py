"""Trees by name and by growth, what a generator refuses, and ties within rounding."""

import jax.numpy as jnp
import numpy as np
import pytest
from samples import VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import DraftTree, DynamicTree, Generator, NgramDrafter, PathDrafter, Sampling, chain, parse_tree
from lin_jax.decoding.drafters import DraftParts
from lin_jax.decoding.plan import dynamic_tokens, grow_tree
from lin_jax.decoding.replay import measure_hits, measure_places
from lin_jax.decoding.tree import MC_SIM_7B_63, tree_text
from lin_jax.errors import UserError
from lin_jax.models import PathHead


def test_grown_tree_is_what_it_claims() -> None:
    rng = np.random.default_rng(2)
    hits = rng.random((3, 100, 3, 4)) < np.array([0.5, 0.2, 0.1, 0.05])
    trees = grow_tree(hits, 9)
    assert [tree.size for tree, _ in trees] == list(range(1, 10))
    for tree, expected in trees:
        yields = []
        for text in hits:
            place = 0
            while place < len(text):
                hit = text[place]
                yields.append(
                    1 + max((len(p) for p in tree.paths if all(hit[d, r] for d, r in enumerate(p))), default=0)
                )
                place += yields[-1]
        assert expected == pytest.approx(np.mean(yields))


def test_what_texts_promise_is_what_decoding_gives() -> None:
    """Tokens a step, foretold from hits and from places in dynamic trees, against the loop on the same texts."""
    model = build_model("augmented", dtype="float32")
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 20)).tolist()
    texts = Generator(model).generate(prompts, 200).tokens
    drafter = KnowingDrafter(padded(prompts, texts), 3, 0.7)
    fixed, promised = grow_tree(measure_hits(model, drafter, prompts, texts, depth=4), 9)[-1]
    dynamic = DynamicTree(6, 3, 2, 3)
    places = measure_places(model, drafter, prompts, texts, dynamic)[:, :, -1]
    foretold = dict(dynamic_tokens(places, dynamic.size))[dynamic.size]
    for tree, expected in ((fixed, promised), (dynamic, foretold)):
        done = Generator(model, drafter=drafter, tree=tree).generate(prompts, 200)
        assert done.tokens == texts
        assert expected > 1.5
        # What is left at the ends of the texts is all that differs.
        assert done.mean_accepted_tokens == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "text", ["chain:x", "0;0,0,0", "a", "0,-1", "", "dynamic:8", "dynamic:99:2:2:2", "dynamic:1:1"]
)
def test_bad_trees(text: str) -> None:
    with pytest.raises(UserError, match=r"(draft|dynamic) tree"):
        parse_tree(text)


def test_tree_names() -> None:
    assert parse_tree("chain:3") == chain(3) == DraftTree(((0,), (0, 0), (0, 0, 0)))
    assert parse_tree("0;1;0,1") == DraftTree(((0,), (1,), (0, 1)))
    assert parse_tree("mc_sim_7b_63") is MC_SIM_7B_63
    assert MC_SIM_7B_63.size == 64
    assert parse_tree("dynamic:9:3") == DynamicTree(9, 3)
    for tree in (DraftTree(), chain(2), MC_SIM_7B_63, DynamicTree(7, 3, 2, 3)):
        assert parse_tree(tree_text(tree)) == tree


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
    with pytest.raises(UserError, match="no distribution"):
        Generator(model, drafter=NgramDrafter(depth=2), acceptance="rejection")
    path = PathDrafter(PathHead.on(model, 4, nnx.Rngs(0)))
    with pytest.raises(UserError, match="fixed shape"):
        Generator(model, drafter=path, tree=DynamicTree(3, 2), acceptance="rejection")
    with pytest.raises(UserError, match="temperature above 0"):
        Generator(model, drafter=path, tree=chain(2), acceptance="rejection").generate([[1]], 3)
    with pytest.raises(UserError, match="acceptance 'maybe'"):
        Generator(model, acceptance="maybe")
    with pytest.raises(UserError, match="number of slots is 0"):
        Generator(model).generate([[1]], 3, slots=0)
    with pytest.raises(UserError, match="layers"):
        DraftParts(model, layers=(0, 1))


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
