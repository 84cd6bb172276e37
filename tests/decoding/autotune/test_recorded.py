"""Acceptance that training recorded of heads, as evidence to begin with."""

import numpy as np
import pytest
from support.samples import KnowingDrafter

from lin_jax.decoding import DraftTree, NgramDrafter, UnionDrafter, chain
from lin_jax.decoding.autotune.chooser import MIN_VALUE, TRIAL_STEPS, Chooser
from lin_jax.decoding.autotune.shapes import BUSHY, draft_shapes
from lin_jax.decoding.autotune.steering import RECORDED_STEPS, accepted_shares, recorded_evidence

RIGHT = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.0], [0.4, 0.1, 0.1]])


def test_shares_are_those_of_drawn_steps() -> None:
    """A tree of heads, against many steps in which the token of each depth has the rank that the table says."""
    tree, rng = DraftTree(BUSHY), np.random.default_rng(0)
    paths, reached = set(tree.paths), np.zeros(4)
    drawn = np.sum(rng.random((20_000, 3, 1)) >= np.cumsum(RIGHT, axis=1), axis=2)
    for ranks in map(tuple, drawn.tolist()):
        depth = next((d for d in range(3) if ranks[: d + 1] not in paths), 3)
        reached[: depth + 1] += 1
    expected = reached[1:] / reached[:-1]
    np.testing.assert_allclose(accepted_shares(tree, RIGHT), expected, atol=0.02)
    # A chain takes the best guesses, of a drafter whose ranks may come after another's.
    for first in (0, 2):
        line = DraftTree(tuple((first,) * size for size in range(1, 8)))
        np.testing.assert_allclose(accepted_shares(line, RIGHT, first), RIGHT[:, 0])
    assert not accepted_shares(chain(0), RIGHT).size


@pytest.mark.parametrize("good", [True, False])
def test_good_heads_are_used_from_the_first_step_on(good: bool) -> None:
    """Without a trial; where the record promises nothing, they are tried as if there were none: shortly."""
    heads = KnowingDrafter(np.zeros((1, 8), np.int32), 2, 0.6)
    shapes = draft_shapes(UnionDrafter(NgramDrafter(depth=7), heads), 7)
    table = np.full((4, 4), 0.0)
    table[:, 0] = 0.8 if good else 0.15
    evidence = recorded_evidence(shapes, {1: table})
    family = next(family for family, (index, _) in shapes.origins.items() if index == 1)
    assert evidence.tries[0, family, :4].tolist() == [RECORDED_STEPS if good else 0] * 4
    assert not evidence.tries[0, 0].any()
    costs = [1 + 0.3 * (tree.size - 1) for tree in shapes.trees]
    chooser = Chooser(shapes.arms, costs.__getitem__, 1, copies=frozenset({0}), learned=evidence, visit_cost=0.1)
    running, ready = np.ones(1, bool), range(1, len(shapes.arms))
    first = chooser.choose(running, ready, 128)
    assert shapes.arms[first.arm].family == family
    assert first.arm
    assert (max(chooser.values(running)) > MIN_VALUE) == good
    assert good or first.steps == TRIAL_STEPS
