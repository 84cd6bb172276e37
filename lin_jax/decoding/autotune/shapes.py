"""Draft shapes that the loop chooses among while it decodes: chains of a few lengths and a tree, for any drafter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lin_jax.decoding.autotune.choice import Arm
from lin_jax.decoding.drafting.api import Drafter, ScoringDrafter
from lin_jax.decoding.drafting.drafters.copy import CopyDrafter
from lin_jax.decoding.drafting.drafters.ngram import NgramDrafter
from lin_jax.decoding.drafting.drafters.suffix import SuffixDrafter
from lin_jax.decoding.drafting.drafters.union import UnionDrafter
from lin_jax.decoding.drafting.hindsight import Hindsight, MemoryHindsight, Retrospective
from lin_jax.decoding.drafting.ngram_lookup import LOOKED_UP
from lin_jax.decoding.drafting.text_memory import TextMemory
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree

# Guesses of the chains: 2, 4 and 8 nodes with the root.
LENGTHS = (1, 3, 7)
# More, of 16 and 32 nodes, for drafters that copy whole passages.
LONG_COPIES = (15, 31)
# A tree of 8 nodes for heads, whose second guesses are often right: ranks below the root.
BUSHY = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))


@dataclass(frozen=True)
class DraftShapes:
    """Shapes for one drafter, plain decoding first.

    Attributes:
        trees: the shapes.
        arms: family and depth of each.
        hindsight: for families whose guesses the host can follow, what does so.
        origins: for families whose trees one drafter fills, its index in a union (0 alone), and its first rank there.
    """

    trees: tuple[AnyTree, ...]
    arms: tuple[Arm, ...]
    hindsight: dict[int, Callable[[], Hindsight]]
    origins: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def alerting(self) -> frozenset[int]:
        """Families that copy from the text itself, where the loop can find a match, maybe beside other places."""
        return frozenset(family for family, begin in self.hindsight.items() if begin().longest)

    @property
    def switching(self) -> frozenset[int]:
        """Shapes that copy from the text itself alone, so that the loop knows where there is nothing to copy."""
        alone = {family for family in self.alerting if not isinstance(self.hindsight[family](), MemoryHindsight)}
        return frozenset(number for number, arm in enumerate(self.arms) if arm.depth and arm.family in alone)

    @property
    def depth(self) -> int:
        """Depth of the deepest shape."""
        return max(tree.depth for tree in self.trees)


def draft_shapes(
    drafter: Drafter,
    deepest: int | None = None,
    extra: AnyTree | None = None,
    memory: TextMemory | None = None,
) -> DraftShapes:
    """Shapes for a drafter: of every drafter in a union chains of its own, of those with scores a tree too.

    Args:
        drafter: the drafter.
        deepest: largest depth that the model's attention can verify; None sets no limit.
        extra: one more shape, such as the one that a thorough search has found.
        memory: the memory that a drafter was built with, so that the host can tell what it would have given.
    """
    trees: list[AnyTree] = [DraftTree()]
    arms = [Arm(0, 0)]
    hindsight: dict[int, Callable[[], Hindsight]] = {}
    origins: dict[int, tuple[int, int]] = {}
    family = first = 0
    sides = list(drafter.drafters) if isinstance(drafter, UnionDrafter) else [drafter]
    copied = any(isinstance(each, NgramDrafter) for each in sides)
    for index, each in enumerate(sides):
        depth = each.depth if deepest is None else min(each.depth, deepest)
        chains = sorted({min(length, depth) for length in LENGTHS} - {0})
        if isinstance(each, NgramDrafter | SuffixDrafter | CopyDrafter):
            chains += [length for length in LONG_COPIES if length <= depth]
        if each.width and chains:
            trees += [DraftTree(tuple((first,) * size for size in range(1, length + 1))) for length in chains]
            arms += [Arm(family, length) for length in chains]
            if isinstance(each, Retrospective):
                hindsight[family] = partial(each.hindsight, chains[-1])
            elif isinstance(each, SuffixDrafter | CopyDrafter) and memory is not None:
                # What the text itself gives is told by another drafter beside it.
                longest = 0 if copied or isinstance(each, CopyDrafter) else LOOKED_UP
                hindsight[family] = partial(MemoryHindsight, chains[-1], memory, longest, each.lookback)
            origins[family] = index, first
            family += 1
        bushy = DraftTree(tuple(tuple(first + rank for rank in path) for path in BUSHY if len(path) <= depth))
        if isinstance(each, ScoringDrafter) and each.width > 1 and depth > 1:
            trees.append(bushy)
            arms.append(Arm(family, bushy.depth))
            origins[family] = index, first
            family += 1
        first += each.width
    if extra is not None and extra not in trees:
        trees.append(extra)
        arms.append(Arm(family, extra.depth))
    return DraftShapes(tuple(trees), tuple(arms), hindsight, origins)
