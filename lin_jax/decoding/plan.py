"""Choosing how to draft on this machine: measured cost of a step times measured hits of a drafter, then a trial.

A tree of fixed shape grows greedily from the root, always by the node that adds the most accepted tokens on texts that
the model wrote itself (Cai et al. 2024 and Sequoia, Chen et al. 2024, grow theirs from accuracies). Working on the hits
themselves, not on their averages, counts right what two drafters guess alike. What looks best is tried against plain
decoding, which is what remains if nothing wins.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath

import numpy as np
from jaxtyping import Bool, Int

from lin_jax.decoding.costs import Costs, device_kind, measure_drafting
from lin_jax.decoding.draft import Drafter
from lin_jax.decoding.dynamic import DynamicTree
from lin_jax.decoding.generator import Generator, Tree
from lin_jax.decoding.replay import measure_hits, measure_places, tokens_per_step
from lin_jax.decoding.tree import DraftTree, Path, parse_tree, tree_text
from lin_jax.models import CausalModel

# What speculation must gain to be worth its while: less than that is noise.
WORTH = 1.02
LARGEST = 32
# Of dynamic trees: how many nodes of each depth get children, and how many at the most.
BEAM = 4


@dataclass(frozen=True)
class Plan:
    """A tree, and why it was chosen.

    Attributes:
        drafter: kind of drafter that it is for.
        slots: batch size that it is for.
        tree: the tree, as `parse_tree` reads it.
        device: kind of device that it was measured on.
        worth: tokens that a step must yield to be as fast as plain decoding, as tried; None if nothing was tried.
        expected_tokens: per step, on the texts it was chosen by.
        expected_speedup: over plain decoding, by the costs of steps.
        measured_speedup: over plain decoding, as tried; 1 for plain decoding itself.
    """

    drafter: str
    slots: int
    tree: str
    device: str = ""
    worth: float | None = None
    expected_tokens: float = 1.0
    expected_speedup: float = 1.0
    measured_speedup: float = 1.0

    @property
    def shape(self) -> Tree:
        """The tree itself."""
        return parse_tree(self.tree)


def make_plan(
    model: CausalModel,
    kind: str,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    costs: Costs,
) -> Plan:
    """The best tree for a drafter, tried against plain decoding at the costs' batch size.

    Args:
        model: the model.
        kind: name of the drafter.
        drafter: the drafter.
        prompts: what the texts go on from.
        texts: the model's own continuations, all of one length.
        costs: of verifying, on this machine.
    """
    plain = Plan(kind, costs.slots, "none", device_kind())
    candidates = shortlist(model, kind, drafter, prompts, texts, costs)
    if not candidates:
        return plain
    found = trial(model, drafter, [each.shape for each in candidates], prompts, len(texts[0]), costs.slots)
    tried = [
        replace(each, measured_speedup=speedup, worth=worth)
        for each, (speedup, worth) in zip(candidates, found, strict=True)
    ]
    best = max(tried, key=lambda each: each.measured_speedup)
    return best if best.measured_speedup >= WORTH else plain


def shortlist(
    model: CausalModel,
    kind: str,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    costs: Costs,
) -> list[Plan]:
    """The trees that promise most, one of fixed shape and a dynamic one, if they promise anything."""
    # A path must be shorter than a group, and pays only where it is likely to be right to its end.
    group = model.config.attention.group_size
    deepest = min(drafter.depth, group - 1, 8)
    drafting = measure_drafting(model, drafter, costs, deepest)
    largest = min(LARGEST, max(costs.sizes))

    def plan(tree: Tree, tokens: float) -> Plan:
        speedup = tokens * costs.verify(1) / (costs.verify(tree.size) + tree.depth * drafting)
        return Plan(kind, costs.slots, tree_text(tree), device_kind(), None, tokens, speedup)

    hits = measure_hits(model, drafter, prompts, texts, depth=deepest)
    fixed = [
        plan(tree, tokens)
        for depth in range(1, deepest + 1)
        for tree, tokens in grow_tree(hits[:, :, :depth], largest)
        if tree.depth == depth
    ]
    moving = []
    if drafter.width > 1:
        whole = DynamicTree(2, deepest, BEAM, min(BEAM, drafter.width))
        places = measure_places(model, drafter, prompts, texts, whole)
        for depth in range(1, deepest + 1):
            most = min(largest, replace(whole, depth=depth).most)
            for size, tokens in dynamic_tokens(places[:, :, depth - 1], most):
                moving.append(plan(replace(whole, size=size, depth=depth), tokens))
    best = [max(each, key=lambda plan: plan.expected_speedup) for each in (fixed, moving) if each]
    return [each for each in best if each.expected_speedup > 1]


def dynamic_tokens(places: Int[np.ndarray, "B P D"], largest: int) -> Iterator[tuple[int, float]]:
    """Tokens that a step yields with dynamic trees of 2 up to `largest` nodes."""
    for size in range(2, largest + 1):
        yield size, tokens_per_step(np.cumprod(places < size, axis=2).sum(axis=2))


def grow_tree(hits: Bool[np.ndarray, "B P D R"], largest: int) -> list[tuple[DraftTree, float]]:
    """Trees of 1 up to `largest` nodes, each grown from the last, and the tokens that each yields per step."""
    depth, width = hits.shape[2:]
    stands: dict[Path, np.ndarray] = {(): np.ones(hits.shape[:2], bool)}
    reached = np.zeros(hits.shape[:2], int)
    candidates: dict[Path, np.ndarray] = {(rank,): hits[:, :, 0, rank] for rank in range(width)} if depth else {}
    trees = [(DraftTree(), 1.0)]
    while len(trees) < largest and candidates:
        gains = {path: int((stand & (reached < len(path))).sum()) for path, stand in candidates.items()}
        best = max(gains, key=lambda path: (gains[path], -len(path), tuple(-rank for rank in path)))
        if not gains[best]:
            break
        stands[best] = candidates.pop(best)
        reached = np.maximum(reached, stands[best] * len(best))
        if len(best) < depth:
            for rank in range(width):
                candidates[*best, rank] = stands[best] & hits[:, :, len(best), rank]
        paths = tuple(path for path in stands if path)
        trees.append((DraftTree(paths), tokens_per_step(reached)))
    return trees


def trial(
    model: CausalModel,
    drafter: Drafter,
    trees: Sequence[Tree],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    slots: int,
    rounds: int = 3,
) -> list[tuple[float, float]]:
    """How many times faster than plain decoding each tree writes, and how many tokens its steps must yield for 1.

    Median over rounds in which all take turns.
    """
    generators = [Generator(model), *(Generator(model, drafter=drafter, tree=tree) for tree in trees)]
    # Whole batches only, and no more of them than it takes to see a difference.
    count = slots * max(1, min(len(prompts), 8) // slots)
    asked = [prompts[index % len(prompts)] for index in range(count)]
    rates, tokens_per_step = np.zeros((rounds + 1, len(generators))), np.zeros(len(generators))
    for turn in range(rounds + 1):
        for index, generator in enumerate(generators):
            done = generator.generate(asked, tokens, slots=slots)
            rates[turn, index], tokens_per_step[index] = done.tokens_per_second, done.mean_accepted_tokens
    speedups = np.median(rates[1:, 1:] / rates[1:, :1], axis=0)
    return list(zip(speedups.tolist(), (tokens_per_step[1:] / speedups).tolist(), strict=True))


def save_plans(path: FilePath, plans: Sequence[Plan], costs: Sequence[Costs]) -> None:
    """Writes plans and costs as JSON."""
    content = {"costs": [asdict(each) for each in costs], "plans": [asdict(plan) for plan in plans]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_plans(path: FilePath) -> tuple[list[Plan], list[Costs]]:
    """The plans and costs that were measured on this kind of device, if there are any."""
    if not path.exists():
        return [], []
    content = json.loads(path.read_text())
    try:
        plans = [Plan(**each) for each in content["plans"]]
        costs = [Costs(each["slots"], tuple(each["sizes"]), tuple(each["seconds"])) for each in content["costs"]]
    except (KeyError, TypeError):
        # Another version wrote it: it is measured anew.
        return [], []
    if any(plan.device != device_kind() for plan in plans):
        return [], []
    return plans, costs
