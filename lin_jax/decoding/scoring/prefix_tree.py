"""Shared prefixes of token sequences: a tree whose nodes are read once each, on top of the state of their parent."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A prefix is read on its own if that leaves out so many tokens in all, and has so many itself: a batch of its own costs
# about as much as reading that much.
MIN_SAVED, MIN_SHARED = 32, 8


@dataclass
class PrefixNode:
    """Tokens that some sequences have in common, behind those of the node's parents.

    Attributes:
        tokens: the node's own tokens.
        begin: number of tokens before them.
        ends: numbers of the sequences that end with this node.
        children: nodes of the sequences that go on.
        sequences: number of sequences in the node and below.
    """

    tokens: tuple[int, ...]
    begin: int
    ends: list[int]
    sequences: int
    children: list["PrefixNode"] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Number of tokens up to the node's last."""
        return self.begin + len(self.tokens)


class PrefixGroup(NamedTuple):
    """Sequences that begin alike.

    Attributes:
        length: number of tokens that they share; 0 for sequences that share nothing.
        members: numbers of the sequences.
    """

    length: int
    members: list[int]


def build_prefix_tree(sequences: Sequence[Sequence[int]], *, share: bool = True) -> list[PrefixNode]:
    """Builds the tree of some sequences; a short or rarely shared prefix stays a part of each of its sequences.

    Args:
        sequences: token ids; none may be empty.
        share: False shares nothing but whole sequences, which are read once if they are equal.

    Returns:
        The nodes that begin a sequence. Every sequence is the tokens of the nodes from one of them to where it ends.
    """
    rows = [tuple(map(int, sequence)) for sequence in sequences]
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row, []).append(number)
    whole = sorted(numbers)
    ends = [numbers[row] for row in whole]
    if not share:
        return [PrefixNode(row, 0, each, len(each)) for row, each in zip(whole, ends, strict=True)]
    return _Builder(whole, ends).build()


class _Builder:
    """Distinct sequences in order, and how many tokens each shares with the one before it."""

    def __init__(self, whole: list[tuple[int, ...]], ends: list[list[int]]) -> None:
        self.whole, self.ends = whole, ends
        self.common = np.asarray([0, *(_common(one, other) for one, other in pairwise(whole))])

    def build(self) -> list[PrefixNode]:
        roots: list[PrefixNode] = []
        pending = deque([(roots, 0, len(self.whole), 0)])
        while pending:
            siblings, first, last, begin = pending.popleft()
            for low, high, shared in self._nodes(first, last, begin):
                node = PrefixNode(self.whole[low][begin:shared], begin, [], sum(map(len, self.ends[low:high])))
                siblings.append(node)
                if len(self.whole[low]) == shared:
                    node.ends, low = self.ends[low], low + 1
                if low < high:
                    pending.append((node.children, low, high, shared))
        return roots

    def _nodes(self, first: int, last: int, begin: int) -> Iterator[tuple[int, int, int]]:
        """Yields range and end of each node behind `begin` tokens that all sequences of a range share."""
        ranges = [(first, last, begin)]
        while ranges:
            first, last, depth = ranges.pop()
            edges = [first, *(first + 1 + np.flatnonzero(self.common[first + 1 : last] <= depth)).tolist(), last]
            for low, high in pairwise(edges):
                if high - low == 1:
                    yield low, high, len(self.whole[low])
                    continue
                shared = int(self.common[low + 1 : high].min())
                length = shared - begin
                if length >= MIN_SHARED and length * (high - low - 1) >= MIN_SAVED:
                    yield low, high, shared
                elif len(self.whole[low]) == shared:
                    yield low, low + 1, shared
                    ranges.append((low + 1, high, shared))
                else:
                    ranges.append((low, high, shared))


def shared_prefix_groups(
    sequences: Sequence[Sequence[int]], *, smallest: int = 1, share: bool = True
) -> list[PrefixGroup]:
    """Groups sequences by one prefix each, so that as few tokens as possible are read again.

    Args:
        sequences: token ids; none may be empty.
        smallest: sequences of a group, at the least: each group is a batch of its own.
        share: False makes one group that shares nothing.
    """
    if not share:
        return [PrefixGroup(0, list(range(len(sequences))))]
    groups: list[PrefixGroup] = []
    alone: list[int] = []
    for root in build_prefix_tree(sequences):
        best = _best_groups(root, max(smallest, 2))
        groups += best.groups
        alone += best.alone
    return [*groups, *([PrefixGroup(0, sorted(alone))] if alone else [])]


class _Grouping(NamedTuple):
    """Tokens that are not read again, the groups that this takes, and the sequences of none."""

    saved: int
    groups: list[PrefixGroup]
    alone: list[int]


def _best_groups(node: PrefixNode, smallest: int) -> _Grouping:
    """The groups of a node and below that leave out most."""
    saved, groups, alone = 0, list[PrefixGroup](), list(node.ends)
    for child in node.children:
        below = _best_groups(child, smallest)
        saved, groups, alone = saved + below.saved, groups + below.groups, alone + below.alone
    apart = node.end * (len(alone) - 1) if len(alone) >= smallest else 0
    together = node.end * (node.sequences - 1) if node.sequences >= smallest else 0
    if together > saved + apart:
        members = [*alone, *(number for group in groups for number in group.members)]
        return _Grouping(together, [PrefixGroup(node.end, sorted(members))], [])
    if apart:
        return _Grouping(saved + apart, [*groups, PrefixGroup(node.end, sorted(alone))], [])
    return _Grouping(saved, groups, alone)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of tokens with which both begin."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(different[0]) if len(different) else length
