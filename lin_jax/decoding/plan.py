"""Choosing the draft tree for this machine: measured cost of a step times measured hits of the drafter.

The tree grows greedily from the root, always by the node that adds the most accepted tokens on texts that the model
wrote itself (Cai et al. 2024 and Sequoia, Chen et al. 2024, grow theirs from accuracies). Working on the hits
themselves, not on their averages, counts right what two drafters guess alike.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from lin_jax.decoding.drafters import DraftContext, Drafter, MedusaDrafter
from lin_jax.decoding.generator import Generator
from lin_jax.decoding.tree import DraftTree, Path
from lin_jax.errors import UserError
from lin_jax.models import CausalModel, MedusaHeads

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Costs:
    """Seconds of one step on this machine, at batch 1.

    Attributes:
        sizes: numbers of nodes that were measured.
        seconds: of a step that verifies so many nodes, without Medusa heads.
        head_seconds: what each Medusa head adds.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    head_seconds: float

    def step(self, size: int, heads: int) -> float:
        """Seconds of a step with `size` nodes and `heads` Medusa heads, between and at measured sizes."""
        return float(np.interp(size, self.sizes, self.seconds)) + heads * self.head_seconds


@dataclass(frozen=True)
class Plan:
    """A tree, and why it was chosen.

    Attributes:
        drafter: kind of drafter that it is for.
        paths: the tree.
        device: kind of device that the costs were measured on.
        expected_tokens: per step, on the texts it was chosen by.
        expected_speedup: over plain decoding.
    """

    drafter: str
    paths: tuple[Path, ...]
    device: str
    expected_tokens: float
    expected_speedup: float

    @property
    def tree(self) -> DraftTree:
        """The tree itself."""
        return DraftTree(self.paths)


def device_kind() -> str:
    """The kind of device that JAX runs on, and how many processors a CPU has."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0))} processors"
    return device.device_kind


class _SilentDrafter(nnx.Module):
    """Never guesses, so that a step costs what verifying costs."""

    depth = 1

    def __init__(self, width: int) -> None:
        self.width = width

    def guess(self, context: DraftContext) -> Int[Array, "B 1 R"]:
        """A table without guesses."""
        return jnp.full((context.length.shape[0], 1, self.width), -1)


def measure_costs(
    model: CausalModel, heads: MedusaHeads | None, *, sizes: Sequence[int] = SIZES, steps: int = 48, rounds: int = 3
) -> Costs:
    """Times steps over trees of several sizes, in turn, and takes each one's median."""
    prompt = list(range(1, 17))
    flat = [DraftTree(tuple((rank,) for rank in range(size - 1))) for size in sizes]
    generators = [Generator(model, drafter=_SilentDrafter(tree.width), tree=tree) for tree in flat]
    if heads is not None:
        generators.append(Generator(model, drafter=MedusaDrafter(heads), tree=DraftTree(((0,),))))
    seconds = np.array(
        [[_seconds_per_step(generator, prompt, steps) for generator in generators] for _ in range(rounds + 1)]
    )
    median = np.median(seconds[1:], axis=0)
    plain = np.maximum.accumulate(median[: len(sizes)])
    head_seconds = 0.0
    if heads is not None:
        extra = float(median[-1]) - float(np.interp(2, sizes, plain))
        head_seconds = max(extra, 0.0) / heads.count
    return Costs(tuple(sizes), tuple(float(x) for x in plain), head_seconds)


def _seconds_per_step(generator: Generator, prompt: Sequence[int], steps: int) -> float:
    generation = generator.generate([prompt], steps)
    return generation.decode_seconds / max(sum(generation.steps), 1)


def measure_hits(
    model: CausalModel, drafter: Drafter, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Bool[np.ndarray, "P M R"]:
    """Where a drafter's guesses would have been right, at every position of texts that the model wrote.

    Args:
        model: the model.
        drafter: the drafter.
        prompts: what each text was an answer to.
        texts: the model's own continuations.
    """
    width = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.zeros(width, np.int32)
        tokens[: len(prompt) + len(text)] = [*prompt, *text]
        roots = np.arange(len(prompt), len(prompt) + len(text) - drafter.depth)
        if not len(roots):
            continue
        # Every row asks at all positions, so that texts of one width share a program.
        table = np.asarray(_guesses(model, drafter, jnp.asarray(tokens)))[roots - 1]
        ahead = roots[:, None] + 1 + np.arange(drafter.depth)
        found.append(table == tokens[ahead][:, :, None])
    if not found:
        raise UserError("the texts are too short to choose a draft tree by; give longer ones")
    return np.concatenate(found)


@jax.jit
def _guesses(model: CausalModel, drafter: Drafter, tokens: jax.Array) -> jax.Array:
    """The guess table `[T - 1, M, R]` with each token but the first as the root."""
    hidden = model.hidden(tokens[None])[0, :-1]
    roots = jnp.arange(1, tokens.shape[0])
    context = DraftContext(hidden, jnp.broadcast_to(tokens, (len(roots), tokens.shape[0])), roots + 1)
    return drafter.guess(context)


def grow_tree(hits: Bool[np.ndarray, "P M R"], largest: int) -> list[tuple[DraftTree, float]]:
    """Trees of 1 up to `largest` nodes, each grown from the last, and the tokens that each yields per step."""
    positions, depth, width = hits.shape
    stands: dict[Path, np.ndarray] = {(): np.ones(positions, bool)}
    reached = np.zeros(positions, int)
    candidates: dict[Path, np.ndarray] = {(rank,): hits[:, 0, rank] for rank in range(width)} if depth else {}
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
                candidates[*best, rank] = stands[best] & hits[:, len(best), rank]
        paths = tuple(path for path in stands if path)
        trees.append((DraftTree(paths), 1 + float(reached.mean())))
    return trees


def choose_plan(kind: str, hits: Bool[np.ndarray, "P M R"], costs: Costs, head_width: int, head_count: int) -> Plan:
    """The tree with the most tokens per second; the empty tree if none beats plain decoding.

    Args:
        kind: kind of drafter.
        hits: `[P, M, R]` of that drafter.
        costs: of this machine.
        head_width: how many of the ranks, the first ones, are Medusa's.
        head_count: how many Medusa heads there are to choose from.
    """
    best = Plan(kind, (), device_kind(), 1.0, 1.0)
    for heads in range(head_count + 1):
        allowed = hits.copy()
        allowed[:, heads:, :head_width] = False
        for tree, tokens in grow_tree(allowed, max(costs.sizes)):
            speedup = tokens * costs.step(1, 0) / costs.step(tree.size, heads)
            if speedup > best.expected_speedup:
                best = Plan(kind, tree.paths, device_kind(), tokens, speedup)
    return best


def save_plans(path: FilePath, plans: Sequence[Plan], costs: Costs) -> None:
    """Writes plans and costs as JSON."""
    path.write_text(json.dumps({"costs": asdict(costs), "plans": [asdict(plan) for plan in plans]}, indent=1))


def load_plan(path: FilePath, kind: str) -> Plan | None:
    """The plan for a kind of drafter, if there is one that was made on this kind of device."""
    if not path.exists():
        return None
    for entry in json.loads(path.read_text())["plans"]:
        plan = Plan(**{**entry, "paths": tuple(map(tuple, entry["paths"]))})
        if plan.drafter == kind and plan.device == device_kind():
            return plan
    return None
