"""What every causal model must show, whatever it is built of: its forms agree, and drafts change no token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.attention import TreeArrays, tree_arrays
from lin_jax.decoding import Generator, NgramDrafter
from lin_jax.models.causal import CausalModel

PARENTS = (-1, 0, 0, 1, 1, 3, 2)
LENGTHS = (3, 6, 11)
ACCEPTED = ((0, 1, 3, 5), (0, 2, 6, 6), (0, 0, 0, 0))
COUNTS = (4, 3, 0)


def random_model(build: Callable[[nnx.Rngs], Any], seed: int = 1) -> Any:
    """Every parameter random and large enough to matter, also those that begin as constants."""
    model, rng = nnx.eval_shape(lambda: build(nnx.Rngs(0))), np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        values = (path[-1] == "scale") + rng.normal(scale=0.3, size=leaf.shape)
        leaf.set_value(jnp.asarray(values, leaf.dtype))
    nnx.update(model, state)
    return model


def draw_tokens(*shape: int, vocabulary: int = 19) -> np.ndarray:
    return np.random.default_rng(2).integers(0, vocabulary, shape)


@jax.jit
def forward(model: Any, tokens: jax.Array, segment_ids: jax.Array | None = None, mask: Any = None) -> jax.Array:
    return model(tokens, segment_ids, mask=mask)


@jax.jit
def tree_then_step(
    model: CausalModel, prompts: jax.Array, tree_tokens: jax.Array, tree: TreeArrays, after: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of a tree's nodes after prompts of several lengths, and of one token more after an accepted path."""
    state = model.init_state(len(LENGTHS), 32)
    _, state = model.prefill(prompts, jnp.asarray(LENGTHS), state)
    hidden, nodes = model.verify(tree_tokens, tree, state)
    state = model.commit(state, nodes, jnp.asarray(ACCEPTED), jnp.asarray(COUNTS))
    return model.logits(hidden), model.logits(model.verify(after[:, None], tree_arrays((-1,)), state)[0][:, 0])


def assert_forms_agree(model: CausalModel) -> None:
    """A tree after a prefill, and a step after a commit, against whole rows that hold each node's own past."""
    prompts, tokens, after = draw_tokens(3, 11), draw_tokens(3, len(PARENTS)), draw_tokens(3)
    tree = tree_arrays(PARENTS)
    above = [[node for node in range(len(PARENTS)) if tree.ancestors[leaf, node]] for leaf in range(len(PARENTS))]
    pasts = [
        [[*prompt[:length], *nodes[path]] for path in above]
        + [[*prompt[:length], *nodes[list(accepted[:count])], last]]
        for prompt, length, nodes, accepted, count, last in zip(
            prompts, LENGTHS, tokens, ACCEPTED, COUNTS, after, strict=True
        )
    ]
    width = max(len(past) for row in pasts for past in row)
    rows = np.array([[past + [0] * (width - len(past)) for past in row] for row in pasts])
    logits = np.asarray(forward(model, jnp.asarray(rows.reshape(-1, width)))).reshape(*rows.shape, -1)
    ends = np.array([[len(past) - 1 for past in row] for row in pasts])
    expected = np.take_along_axis(logits, ends[..., None, None], axis=2)[:, :, 0]

    nodes, step = tree_then_step(model, *map(jnp.asarray, (prompts, tokens)), tree, jnp.asarray(after))
    np.testing.assert_allclose(nodes, expected[:, :-1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(step, expected[:, -1], rtol=1e-9, atol=1e-9)


def assert_drafts_change_nothing(model: CausalModel, new: int) -> None:
    """Greedy decoding plainly, with drafts, and by whole rows: the same tokens."""
    prompts = [draw_tokens(length).tolist() for length in (1, 6, 9)]
    plain = Generator(model, prefill_chunk_size=16).generate(prompts, new)
    drafted = Generator(model, drafter=NgramDrafter(depth=3, lookback=64), prefill_chunk_size=16).generate(prompts, new)
    assert drafted.tokens == plain.tokens
    assert drafted.mean_accepted_tokens > 1
    texts = [prompt + tokens for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    rows = np.array([text[:-1] + [0] * (9 + new - len(text)) for text in texts])
    chosen = np.argmax(forward(model, jnp.asarray(rows)), axis=-1)
    for row, prompt, tokens in zip(chosen, prompts, plain.tokens, strict=True):
        assert row[len(prompt) - 1 : len(prompt) - 1 + new].tolist() == tokens


def assert_documents_are_apart(model: CausalModel) -> None:
    """Rows of several documents and padding on both sides, against each document as a row of its own."""
    length, starts = 9, ((2, 11), (0, 14))
    tokens, segment_ids = draw_tokens(2, 24), np.zeros((2, 24), int)
    for row, begins in enumerate(starts):
        for number, start in enumerate(begins, start=1):
            segment_ids[row, start : start + length] = number
    packed = np.asarray(forward(model, jnp.asarray(tokens), jnp.asarray(segment_ids)))
    parts = [np.s_[row, start : start + length] for row, begins in enumerate(starts) for start in begins]
    alone = forward(model, jnp.asarray([tokens[part] for part in parts]))
    np.testing.assert_allclose([packed[part] for part in parts], alone, rtol=1e-9, atol=1e-9)
