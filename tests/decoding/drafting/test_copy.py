"""Copies from the best place of a memory, against a search through all of it."""

import jax
import jax.numpy as jnp
import numpy as np
from support.samples import build_model

from lin_jax.decoding import CopyDrafter, DynamicTree, TextMemory, chain
from lin_jax.decoding.drafting.api import DraftContext
from lin_jax.decoding.drafting.drafters import DRAFTERS, DraftParts, reads_memory
from lin_jax.decoding.drafting.suffix_index import MAX_MATCH

DEPTH = 5


def slow(texts: list[list[int]], recent: list[int]) -> list[int]:
    """What follows the longest match, of those the one that most tokens follow, of those the latest."""
    best: tuple[int, int, int] = (0, 0, 0)
    copied: list[int] = []
    for number, text in enumerate(texts):
        for end in range(1, len(text)):
            size = 0
            while size < min(end, len(recent), MAX_MATCH) and text[end - 1 - size] == recent[-1 - size]:
                size += 1
            following = text[end : end + DEPTH]
            key = size, len(following), number * 1000 + end
            if size and key > best:
                best, copied = key, following
    return copied + [-1] * (DEPTH - len(copied))


def test_the_best_place_is_copied() -> None:
    """Random texts of few letters, and one that goes round in circles, whose end gives little."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, 40).tolist() for _ in range(3)] + [[7, 8, 9] * 14]
    memory = TextMemory(512)
    for text in texts:
        memory.add(text)
    memory.refresh()
    recents = [rng.integers(0, 5, MAX_MATCH).tolist() for _ in range(20)]
    recents += [texts[1][:20], [7, 8, 9] * 10, [7, 8, 9] * 14, [6]]
    padded = [[-1] * (MAX_MATCH - len(each)) + each[-MAX_MATCH:] for each in recents]
    rows = jnp.asarray(padded, jnp.int32)
    context = DraftContext(rows[:, -1], jnp.zeros((len(recents), 1)), rows)
    drafter = CopyDrafter(memory, depth=DEPTH, candidates=64)
    draft = jax.jit(lambda context: chain(DEPTH).grow(drafter, context, None))(context)
    assert np.asarray(draft.tokens[:, 1:]).tolist() == [slow(texts, recent) for recent in recents]
    # A tree has the same passage, and nothing beside it.
    tree = jax.jit(lambda context: DynamicTree(DEPTH + 1, DEPTH, 1, 1).grow(drafter, context, None))(context)
    assert np.array_equal(tree.tokens, draft.tokens)


def test_a_long_match_tells_the_round_of_a_circle() -> None:
    """A text that leaves a circle after some rounds is copied to its end, and not into one more round."""
    rng, memory = np.random.default_rng(1), TextMemory(512)
    begin, after = rng.integers(20, 40, 30).tolist(), rng.integers(40, 60, 30).tolist()
    text = [*begin, *[7, 8, 9, 10, 11, 12, 13] * 8, *after]
    for each in (text, rng.integers(0, 20, 60).tolist()):
        memory.add(each)
    memory.refresh()
    drafter = CopyDrafter(memory, depth=DEPTH)
    known = [text[: 30 + 7 * 8], text[: 30 + 7 * 6 + 3]]
    rows = jnp.asarray([[-1] * (drafter.lookback - len(each)) + each for each in known], jnp.int32)
    context = DraftContext(rows[:, -1], jnp.zeros((len(known), 1)), rows)
    draft = jax.jit(lambda context: chain(DEPTH).grow(drafter, context, None))(context)
    assert np.asarray(draft.tokens[:, 1:]).tolist() == [after[:DEPTH], [10, 11, 12, 13, 7]]


def test_it_is_known_by_name() -> None:
    assert isinstance(DRAFTERS["copy"](DraftParts(build_model("augmented", dtype="float32"))), CopyDrafter)
    assert reads_memory("path+copy")
    assert not reads_memory("path+ngram")
