"""Trees of shared prefixes hold every sequence, and leave out what they promise."""

import numpy as np
import pytest

from lin_jax.decoding.scoring.prefix_tree import MIN_SAVED, MIN_SHARED, build_prefix_tree, shared_prefix_groups


def spelled(nodes, before=()):
    """Sequences of a tree by number, spelled out along its paths."""
    found = {}
    for node in nodes:
        assert node.begin == len(before)
        text = (*before, *node.tokens)
        below = spelled(node.children, text) | dict.fromkeys(node.ends, text)
        assert node.sequences == len(below)
        found |= below
    return found


def size(nodes):
    return sum(len(node.tokens) + size(node.children) for node in nodes)


@pytest.mark.parametrize("seed", range(6))
def test_a_tree_spells_all_its_sequences(seed):
    chance = np.random.default_rng(seed)
    pieces = [chance.integers(0, 3, chance.integers(1, 30)).tolist() for _ in range(5)]
    orders = [chance.integers(0, 5, chance.integers(1, 5)) for _ in range(40)]
    sequences = [[token for number in order for token in pieces[number]] for order in orders]
    tree, flat = build_prefix_tree(sequences), build_prefix_tree(sequences, share=False)
    whole = {number: tuple(sequence) for number, sequence in enumerate(sequences)}
    assert spelled(tree) == spelled(flat) == whole
    assert size(tree) < size(flat) == sum(map(len, set(whole.values())))
    pending = list(tree)
    while pending:
        node = pending.pop()
        pending += node.children
        if node.children:
            assert len(node.tokens) >= MIN_SHARED


def test_few_shot_examples_and_questions_are_read_once():
    examples, questions = list(range(100, 160)), [[number, *range(200, 220)] for number in range(8)]
    answers = [[1, 2], [3], [3, 4, 5]]
    sequences = [examples + question + answer for question in questions for answer in answers]
    tree = build_prefix_tree(sequences)
    assert size(tree) == 60 + 8 * (21 + 2 + 1 + 3)
    assert [len(node.tokens) for node in tree] == [60]
    assert {len(node.tokens) for node in tree[0].children} == {21}
    # Sharing so little is not worth a batch.
    few = build_prefix_tree([[1, 2, 3, number] for number in range(5, 8)])
    assert [node.tokens for node in few] == [(1, 2, 3, 5), (1, 2, 3, 6), (1, 2, 3, 7)]
    assert (MIN_SHARED, MIN_SAVED) == (8, 32)


def test_groups_have_the_prefix_that_leaves_out_most():
    common, first, second = [9] * 10, list(range(50)), list(range(100, 140))
    sequences = [common + part + [number] for part in (first, second) for number in range(6)]
    sequences += [[7, 7, 7], [8]]
    groups = shared_prefix_groups(sequences, smallest=4)
    assert sorted(groups) == [(0, [12, 13]), (50, list(range(6, 12))), (60, list(range(6)))]
    # Too few for groups of their own, but not together.
    assert sorted(shared_prefix_groups(sequences, smallest=7)) == [(0, [12, 13]), (10, list(range(12)))]
    assert shared_prefix_groups(sequences, share=False) == [(0, list(range(14)))]
    # The same prompt again and again is no reason for a batch of its own.
    assert shared_prefix_groups([list(range(40))] * 2 + [[1]], smallest=3) == [(0, [0, 1, 2])]
