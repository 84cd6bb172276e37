"""Speculation plans for this machine: candidates by measured step costs and draft accuracy, then timed trials.

A static tree grows greedily from the root, always by the node that adds the most accepted tokens on texts that the
model wrote itself (Cai et al. 2024 and Sequoia, Chen et al. 2024, grow theirs from accuracies). Working on the single
hits, not on their averages, counts correctly what two drafters guess alike. The best candidates are timed against plain
decoding, which is kept if none is faster.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from lin_jax.attention import max_draft_depth
from lin_jax.decoding.autotune.costs import Costs, measure_drafting
from lin_jax.decoding.autotune.replay import draft_accuracy, dynamic_tree_ranks, tokens_per_step
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.dynamic_tree import DynamicTree
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree, NodePath, parse_tree, tree_text
from lin_jax.decoding.generator import Generator
from lin_jax.devices import device_kind, machine_flags
from lin_jax.files import write_durably
from lin_jax.models import CausalModel

# Smallest speedup that counts as one: less than that is noise.
MIN_SPEEDUP = 1.02
MAX_TREE_SIZE = 32
# Name of decoding without drafts in all reports.
PLAIN = "plain"
# Parts of the work of `make_plan` that a progress bar counts.
PLAN_TICKS = 7
# Of dynamic trees: number of nodes per depth that get children, and largest number of children of a node.
BEAM = 4


@dataclass(frozen=True)
class SpeculationPlan:
    """Tree for one drafter and batch size, with the figures that it was chosen by.

    Attributes:
        drafter: name of the drafter.
        slots: the batch size.
        tree: the tree, as `parse_tree` reads it.
        device: kind of device that it was measured on, by name: a plan of another one is not used.
        flags: instructions of its CPU, for the same reason.
        break_even_tokens: tokens that a step must yield to be as fast as plain decoding, as measured; None if nothing
            was timed.
        expected_tokens: tokens per step on the calibration texts.
        expected_speedup: speedup over plain decoding by the measured costs of steps.
        measured_speedup: speedup over plain decoding as timed; 1 for plain decoding itself.
    """

    drafter: str
    slots: int
    tree: str
    device: str = ""
    break_even_tokens: float | None = None
    expected_tokens: float = 1.0
    expected_speedup: float = 1.0
    measured_speedup: float = 1.0
    flags: str = field(default_factory=machine_flags)

    @property
    def drafts(self) -> bool:
        """False for plain decoding."""
        return self.shape.size > 1

    @property
    def name(self) -> str:
        """Name of the drafter, or "plain" if nothing is drafted."""
        return self.drafter if self.drafts else PLAIN

    @property
    def summary(self) -> str:
        """The plan in words: what was measured, and apart from it what was expected."""
        if not self.drafts:
            tried = "" if self.drafter == "none" else f" (no tree for {self.drafter} was measured to be faster)"
            return f"batch {self.slots}: plain decoding, 1.00x{tried}"
        return (
            f"batch {self.slots}: {self.drafter}, {self.shape.size} nodes, measured {self.measured_speedup:.2f}x "
            f"(expected {self.expected_speedup:.2f}x before it was timed)"
        )

    @property
    def shape(self) -> AnyTree:
        """Parsed tree."""
        return parse_tree(self.tree)


def make_plan(
    model: CausalModel,
    kind: str,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    costs: Costs,
    *,
    tick: Callable[[], object] = lambda: None,
) -> SpeculationPlan:
    """Chooses the best tree for a drafter, timed against plain decoding at the batch size of the costs.

    Args:
        model: the model.
        kind: name of the drafter.
        drafter: the drafter.
        prompts: token ids of the calibration prompts.
        texts: the model's own continuations of them, all of one length.
        costs: costs of verification on this machine.
        tick: called after each of the `PLAN_TICKS` parts of the work, or fewer.
    """
    plain = SpeculationPlan(kind, costs.slots, "none", device_kind())
    candidates = candidate_plans(model, kind, drafter, prompts, texts, costs, tick=tick)
    if not candidates:
        return plain
    trees = [each.shape for each in candidates]
    found = measure_speedups(model, drafter, trees, prompts, len(texts[0]), costs.slots, tick=tick)
    tried = [
        replace(each, measured_speedup=speedup, break_even_tokens=break_even_tokens)
        for each, (speedup, break_even_tokens) in zip(candidates, found, strict=True)
    ]
    best = max(tried, key=lambda each: each.measured_speedup)
    return best if best.measured_speedup >= MIN_SPEEDUP else plain


def candidate_plans(
    model: CausalModel,
    kind: str,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    costs: Costs,
    *,
    tick: Callable[[], object] = lambda: None,
) -> list[SpeculationPlan]:
    """Plans with the best expected speedup, one static tree and one dynamic, as far as they expect any."""
    # A path must be shorter than a group, and pays only where it is likely to be right to its end.
    deepest = max_draft_depth(model.config.attention)
    max_depth = min(drafter.depth, 8 if deepest is None else deepest, 8)
    drafting = measure_drafting(model, drafter, costs, max_depth)
    tick()
    largest = min(MAX_TREE_SIZE, max(costs.sizes))

    def plan(tree: AnyTree, tokens: float) -> SpeculationPlan:
        speedup = tokens * costs.verify(1) / (costs.verify(tree.size) + tree.depth * drafting)
        return SpeculationPlan(kind, costs.slots, tree_text(tree), device_kind(), None, tokens, speedup)

    hits = draft_accuracy(model, drafter, prompts, texts, depth=max_depth)
    tick()
    static = [
        plan(tree, tokens)
        for depth in range(1, max_depth + 1)
        for tree, tokens in grow_tree(hits[:, :, :depth], largest)
        if tree.depth == depth
    ]
    dynamic = []
    if drafter.width > 1:
        whole = DynamicTree(2, max_depth, BEAM, min(BEAM, drafter.width))
        ranks = dynamic_tree_ranks(model, drafter, prompts, texts, whole)
        for depth in range(1, max_depth + 1):
            max_size = min(largest, replace(whole, depth=depth).max_size)
            for size, tokens in dynamic_tokens(ranks[:, :, depth - 1], max_size):
                dynamic.append(plan(replace(whole, size=size, depth=depth), tokens))
    tick()
    best = [max(each, key=lambda plan: plan.expected_speedup) for each in (static, dynamic) if each]
    return [each for each in best if each.expected_speedup > 1]


def dynamic_tokens(ranks: Int[np.ndarray, "B P D"], max_size: int) -> Iterator[tuple[int, float]]:
    """Yields the sizes 2 up to `max_size` of dynamic trees, and the tokens per step with each."""
    for size in range(2, max_size + 1):
        yield size, tokens_per_step(np.cumprod(ranks < size, axis=2).sum(axis=2))


def grow_tree(hits: Bool[np.ndarray, "B P D R"], max_size: int) -> list[tuple[DraftTree, float]]:
    """Grows static trees of 1 up to `max_size` nodes, each from the last; also gives the tokens per step of each."""
    depth, width = hits.shape[2:]
    hit_masks: dict[NodePath, np.ndarray] = {(): np.ones(hits.shape[:2], bool)}
    reached = np.zeros(hits.shape[:2], int)
    candidates: dict[NodePath, np.ndarray] = {(rank,): hits[:, :, 0, rank] for rank in range(width)} if depth else {}
    trees = [(DraftTree(), 1.0)]
    while len(trees) < max_size and candidates:
        gains = {path: int((mask & (reached < len(path))).sum()) for path, mask in candidates.items()}
        best = max(gains, key=lambda path: (gains[path], -len(path), tuple(-rank for rank in path)))
        if not gains[best]:
            break
        hit_masks[best] = candidates.pop(best)
        reached = np.maximum(reached, hit_masks[best] * len(best))
        if len(best) < depth:
            for rank in range(width):
                candidates[*best, rank] = hit_masks[best] & hits[:, :, len(best), rank]
        paths = tuple(path for path in hit_masks if path)
        trees.append((DraftTree(paths), tokens_per_step(reached)))
    return trees


def measure_speedups(
    model: CausalModel,
    drafter: Drafter,
    trees: Sequence[AnyTree],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    slots: int,
    rounds: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> list[tuple[float, float]]:
    """Times each tree against plain decoding: its speedup, and the tokens per step at which it breaks even.

    Speedups are medians over rounds in which all generators take turns.

    Args:
        model: the model.
        drafter: the drafter.
        trees: the trees.
        prompts: token ids of the prompts.
        tokens: new tokens per prompt.
        slots: the batch size.
        rounds: timed rounds, after one that compiles.
        tick: called after each round.
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
        tick()
    speedups = np.median(rates[1:, 1:] / rates[1:, :1], axis=0)
    return list(zip(speedups.tolist(), (tokens_per_step[1:] / speedups).tolist(), strict=True))


def save_plans(path: Path, plans: Sequence[SpeculationPlan], costs: Sequence[Costs]) -> None:
    """Writes plans and costs to a JSON file, beside those of other drafters and batch sizes that are there by now.

    Raises:
        OSError: it cannot be written.
    """
    known, measured = load_plans(path)
    plans = list({(each.drafter, each.slots): each for each in (*known, *plans)}.values())
    costs = list({each.slots: each for each in (*measured, *costs)}.values())
    content = {"costs": [asdict(each) for each in costs], "plans": [asdict(plan) for plan in plans]}
    write_durably(path, json.dumps(content, indent=1) + "\n")


def load_plans(path: Path) -> tuple[list[SpeculationPlan], list[Costs]]:
    """Reads plans and costs; empty lists if there are none that this version measured on this kind of device."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plans = [SpeculationPlan(**{"flags": None, **each}) for each in content["plans"]]
        costs = [Costs(each["slots"], tuple(each["sizes"]), tuple(each["seconds"])) for each in content["costs"]]
        usable = all(map(_is_usable, plans)) and all(map(_is_measured, costs))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # There is none, another version wrote it, or it is damaged: everything is measured anew.
        return [], []
    return (plans, costs) if usable else ([], [])


def _is_usable(plan: SpeculationPlan) -> bool:
    """True for a plan of this kind of device that holds what it should.

    Raises:
        ValueError: its tree is none.
        TypeError: a field is of another type.
    """
    figures = [plan.expected_tokens, plan.expected_speedup, plan.measured_speedup]
    figures += [] if plan.break_even_tokens is None else [plan.break_even_tokens]
    names = isinstance(plan.drafter, str) and isinstance(plan.slots, int) and isinstance(plan.tree, str)
    here = names and parse_tree(plan.tree).size > 0 and (plan.device, plan.flags) == (device_kind(), machine_flags())
    return here and all(map(math.isfinite, figures))


def _is_measured(costs: Costs) -> bool:
    """True for costs that can be interpolated; errors as in `_is_usable`."""
    if not isinstance(costs.slots, int) or not costs.sizes or len(costs.sizes) != len(costs.seconds):
        return False
    return all(0 < each < math.inf for each in (*costs.sizes, *costs.seconds))
