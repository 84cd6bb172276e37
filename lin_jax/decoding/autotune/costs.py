"""Costs of a step on this machine: verification by tree size and batch size, and drafting by depth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters.none import NoDrafter
from lin_jax.decoding.drafting.tree import DraftTree, chain
from lin_jax.decoding.generator import Generator
from lin_jax.models import CausalModel

SIZES = (1, 2, 4, 8, 16, 32)
# Parts of the work of `measure_costs` that a progress bar counts.
COST_TICKS = len(SIZES)


@dataclass(frozen=True)
class Costs:
    """Seconds of one step on this machine, at one batch size.

    Attributes:
        slots: the batch size.
        sizes: measured numbers of nodes.
        seconds: seconds of a step that verifies as many nodes.
    """

    slots: int
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def verify(self, size: int) -> float:
        """Seconds of a step with `size` nodes, interpolated between measured sizes."""
        return float(np.interp(size, self.sizes, self.seconds))


class NullDrafter(NoDrafter):
    """Offers a tree but never a guess, so that a step costs what verification costs."""

    def __init__(self, width: int, depth: int = 1) -> None:
        self.width = width
        self.depth = depth


def measure_costs(
    model: CausalModel,
    *,
    slots: int = 1,
    sizes: Sequence[int] = SIZES,
    max_cost: float = 8.0,
    steps: int = 32,
    rounds: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> Costs:
    """Times steps with trees of several sizes, in turn, and takes the median of each.

    Args:
        model: the model.
        slots: the batch size.
        sizes: numbers of nodes.
        max_cost: cost, in plain steps, above which larger sizes are not measured: they cannot pay.
        steps: steps per timing.
        rounds: number of timings.
        tick: called after each of the `COST_TICKS` parts of the work, or fewer.
    """
    timed: list[Generator] = []
    first: list[float] = []
    for size in sizes:
        flat = DraftTree(tuple((rank,) for rank in range(size - 1)))
        generator = Generator(model, drafter=NullDrafter(flat.width), tree=flat)
        seconds = seconds_per_step(generator, slots, max(steps // 4, 2))
        if first and seconds > max_cost * first[0]:
            break
        tick()
        timed.append(generator)
        first.append(seconds)
    seconds_of = [[seconds_per_step(generator, slots, steps) for generator in timed] for _ in range(rounds)]
    median = np.maximum.accumulate(np.median(seconds_of, axis=0))
    return Costs(slots, tuple(sizes[: len(timed)]), tuple(float(x) for x in median))


def measure_drafting(
    model: CausalModel, drafter: Drafter, costs: Costs, depth: int, *, steps: int = 32, rounds: int = 3
) -> float:
    """Seconds per token that drafting a chain of the given depth adds to verifying it."""
    generator = Generator(model, drafter=drafter, tree=chain(depth))
    seconds = [seconds_per_step(generator, costs.slots, steps) for _ in range(rounds + 1)]
    return max(float(np.median(seconds[1:])) - costs.verify(depth + 1), 0.0) / depth


def seconds_per_step(generator: Generator, slots: int, steps: int) -> float:
    """Seconds of one step of the whole batch."""
    prompts = [[row + 1, *range(1, 16)] for row in range(slots)]
    # Room for all drafts to be accepted, so that no row ends early.
    limit = steps * (generator.tree_for(slots).depth + 1) + 1
    scheduler = generator.stream(prompts, limit, slots=slots)
    scheduler.advance(steps)
    return scheduler.decode_seconds / steps
