"""What a step costs on this machine: verifying so many nodes at such a batch size, and drafting so deep."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lin_jax.decoding.draft import Drafter
from lin_jax.decoding.drafters.none import NoDrafter
from lin_jax.decoding.generator import Generator
from lin_jax.decoding.tree import DraftTree, chain
from lin_jax.models import CausalModel

SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Costs:
    """Seconds of one step on this machine, at one batch size.

    Attributes:
        slots: the batch size.
        sizes: numbers of nodes that were measured.
        seconds: of a step that verifies so many nodes.
    """

    slots: int
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def verify(self, size: int) -> float:
        """Seconds of a step with `size` nodes, between and at measured sizes."""
        return float(np.interp(size, self.sizes, self.seconds))


def device_kind() -> str:
    """The kind of device that JAX runs on, and how many processors a CPU has."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0))} processors"
    return device.device_kind


class SilentDrafter(NoDrafter):
    """Never guesses, though it has a tree to fill: a step costs what verifying costs."""

    def __init__(self, width: int, depth: int = 1) -> None:
        self.width = width
        self.depth = depth


def measure_costs(
    model: CausalModel,
    *,
    slots: int = 1,
    sizes: Sequence[int] = SIZES,
    most: float = 8.0,
    steps: int = 32,
    rounds: int = 3,
) -> Costs:
    """Times steps over trees of several sizes, in turn, and takes each one's median.

    Args:
        model: the model.
        slots: the batch size.
        sizes: numbers of nodes.
        most: sizes that cost more than this many plain steps are not looked at any further: they cannot pay.
        steps: of each timing.
        rounds: of timings.
    """
    timed: list[Generator] = []
    first: list[float] = []
    for size in sizes:
        flat = DraftTree(tuple((rank,) for rank in range(size - 1)))
        generator = Generator(model, drafter=SilentDrafter(flat.width), tree=flat)
        seconds = seconds_per_step(generator, slots, max(steps // 4, 2))
        if first and seconds > most * first[0]:
            break
        timed.append(generator)
        first.append(seconds)
    seconds_of = [[seconds_per_step(generator, slots, steps) for generator in timed] for _ in range(rounds)]
    median = np.maximum.accumulate(np.median(seconds_of, axis=0))
    return Costs(slots, tuple(sizes[: len(timed)]), tuple(float(x) for x in median))


def measure_drafting(
    model: CausalModel, drafter: Drafter, costs: Costs, depth: int, *, steps: int = 32, rounds: int = 3
) -> float:
    """Seconds that drafting a chain of some depth adds to verifying it, for each token of the chain."""
    generator = Generator(model, drafter=drafter, tree=chain(depth))
    seconds = [seconds_per_step(generator, costs.slots, steps) for _ in range(rounds + 1)]
    return max(float(np.median(seconds[1:])) - costs.verify(depth + 1), 0.0) / depth


def seconds_per_step(generator: Generator, slots: int, steps: int) -> float:
    """Seconds of one step, of all rows together."""
    prompts = [[row + 1, *range(1, 16)] for row in range(slots)]
    # Room for all drafts to be accepted, so that no row ends early.
    limit = steps * (generator.tree_for(slots).depth + 1) + 1
    decoding = generator.stream(prompts, limit, slots=slots)
    decoding.advance(steps)
    return decoding.decode_seconds / steps
