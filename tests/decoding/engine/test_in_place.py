"""Steps change a state's arrays where they lie: the compiler copies none of them as a whole."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from support.cells import cells
from support.samples import build_model

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator, NgramDrafter
from lin_jax.decoding.autotune.costs import NullDrafter
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree, chain
from lin_jax.decoding.engine.decode_loop import run
from lin_jax.decoding.engine.step_loops import LossLimit
from lin_jax.models import SeparateLayers

KERNEL = 5
GROUPS = AttentionConfig(name="clustered+window", group_size=8)
SLIDING = AttentionConfig(name="hedgehog+window", window=16)
ATTENTIONS = cells([GROUPS, SLIDING], [AttentionConfig(name="augmented", group_size=8, kernel_size=KERNEL)])
pytestmark = pytest.mark.users_settings


def copied(attention: AttentionConfig, tree: AnyTree, drafter: Drafter | None = None) -> Counter[str]:
    """How often a step of the loop copies arrays of each shape of the state's keys, values and memories.

    A drafter that looks back takes its steps in turn with plain ones.
    """
    model = build_model(attention, dtype="float32")
    model.layers = SeparateLayers.of(model.layers)
    own = drafter or NullDrafter(1, tree.depth)
    scheduler = Generator(model, drafter=own, tree=tree).stream([[3, 1, 4], [2, 7]], 40)
    state = scheduler.state
    shapes = {
        f"f32[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(state.decode_state.model)
        # The few values of a convolution are shifted at every step.
        if leaf.dtype == np.float32 and leaf.ndim == 5 and leaf.shape[2] != KERNEL // 2
    }
    options = scheduler.spec.options[-1]
    limits = (LossLimit(np.float32(2), np.float32(5)), np.int32(3)) if own.lookback else ()
    arguments = scheduler.modules, state, None, np.int32(9), np.bool_(False), *limits
    program = run.lower(*arguments, options=options).compile()
    # What is copied before the loop, or on the way through one that is joined with others, counts nothing.
    bodies = [text for text in program.as_text().split("\n\n") if not re.match(r"ENTRY|%fused", text.lstrip())]
    found = re.findall(r"= (\S+?)\{\S* copy\(", "\n".join(bodies))
    return Counter(shape for shape in found if shape in shapes)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda each: each.name)
def test_plain_steps_copy_nothing_of_the_state(attention):
    assert not copied(attention, DraftTree())


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda each: each.name)
def test_paths_are_written_where_the_state_lies(attention):
    assert not copied(attention, chain(3))


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda each: each.name)
def test_so_are_copies_in_turn_with_plain_steps(attention):
    assert not copied(attention, chain(3), NgramDrafter(depth=3, lookback=32))
