"""The option under which plain decoding, drafts of any shape and batches of any size give the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig, tree_arrays
from lin_jax.decoding import Generator, parse_tree
from lin_jax.decoding.drafting.drafters import NgramDrafter
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.stored_weights import WeightStorage
from lin_jax.session import SAME_BITS_CHUNK, draft_parts

# Short texts over few tokens, which repeat, so that many drafts are accepted.
PROMPTS = [[1, 2, 3, 1, 2, 3, 1], [5], [4, 4, 4, 2] * 10]


def target(attention: str, dtype: str):
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        attention=AttentionConfig(attention, group_size=8, kernel_size=5),
        dtype=dtype,
        param_dtype=dtype,
        initializer_range=0.2,
    )
    model = Llama(config, rngs=nnx.Rngs(3))
    return draft_parts(model, storage=WeightStorage(same_bits=True)).target


def generator(model, tree: str, matches: int = 1) -> Generator:
    drafter = None if tree == "none" else NgramDrafter(matches=matches)
    return Generator(model, drafter=drafter, tree=parse_tree(tree), prefill_chunk_size=SAME_BITS_CHUNK)


CELLS = cells(
    always=[("augmented", "float32")],
    thorough=[
        (attention, dtype)
        for attention in ("augmented", "softmax", "performer+local")
        for dtype in ("float32", "bfloat16")
    ],
)


@jax.jit
def read(model, state, tokens, lengths):
    return model.prefill(tokens, lengths, state)[1]


@jax.jit
def score(model, state, tokens, tree):
    hidden, nodes = model.verify(tokens, tree, state)
    return model.logits(hidden), nodes


@jax.jit
def commit(model, state, nodes, path, length):
    return model.commit(state, nodes, path, length)


@pytest.mark.thorough
@pytest.mark.parametrize(("attention", "dtype"), CELLS)
def test_nodes_and_rows_have_the_bits_of_plain_decoding(attention, dtype):
    model = target(attention, dtype)
    # Six tokens of a group of eight, and a tree over its end.
    prompt, path = jnp.asarray([[1, 2, 3, 1, 2, 3]]), jnp.asarray([[4, 5, 6, 7]])
    state = read(model, model.init_state(1, 16), prompt, jnp.asarray([6]))
    steps, now = [], state
    for at in range(4):
        logits, nodes = score(model, now, path[:, at : at + 1], tree_arrays((-1,)))
        steps.append(logits[0, 0])
        now = commit(model, now, nodes, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    tree, order = tree_arrays((-1, 0, 0, 2, 3)), [0, 2, 3, 4]
    guesses = jnp.asarray([[4, 9, 5, 6, 7]])
    logits, nodes = score(model, state, guesses, tree)
    np.testing.assert_array_equal(np.asarray(logits[0, jnp.asarray(order)]), np.asarray(jnp.stack(steps)))
    after = commit(model, state, nodes, jnp.asarray([order]), jnp.asarray([4]))
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    # The same text among others, of another length.
    others = jnp.asarray([[7, 7, 0, 0, 0, 0], [1, 2, 3, 1, 2, 3], [5, 0, 0, 0, 0, 0]])
    batch = read(model, model.init_state(3, 16), others, jnp.asarray([2, 6, 1]))
    found, _ = score(model, batch, jnp.tile(guesses, (3, 1)), tree)
    np.testing.assert_array_equal(np.asarray(found[1]), np.asarray(logits[0]))


CHAIN, TREE = ("chain:5", 1), ("0;1;0,0;0,1;0,0,0;0,0,0,0;0,0,0,1;1,0;1,0,0", 2)


@pytest.mark.parametrize("drafts", cells([[TREE]], [[CHAIN]]), ids=["tree", "chain"])
@pytest.mark.parametrize(("attention", "dtype"), CELLS)
def test_drafts_and_batches_change_no_token(attention, dtype, drafts):
    model = target(attention, dtype)
    plain = generator(model, "none")
    alone = [plain.generate([prompt], 60).tokens[0] for prompt in PROMPTS]
    for tree, matches in (("none", 1), *drafts):
        found = generator(model, tree, matches).generate(PROMPTS, 60)
        assert list(found.tokens) == alone
        assert tree == "none" or found.mean_accepted_tokens > 1.2
