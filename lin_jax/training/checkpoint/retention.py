"""The policy by which checkpoints of a run stay on the disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN


@dataclass(frozen=True)
class BestByLoss:
    """A policy for Orbax: the checkpoints with the lowest validation losses stay.

    Orbax's own `BestN` ranks by a file that it reads from every checkpoint before anyone can prove it, and a damaged
    one stops the run; these losses come from proven files.

    Attributes:
        count: how many stay.
        losses: validation losses by step, as far as they are known; the owner keeps them up to date.
    """

    count: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Decides for each of some checkpoints if it stays; of two equal ones the newer is the better."""
        rated = [info.step for info in checkpoints if info.step in self.losses]
        best = sorted(rated, key=lambda step: (self.losses[step], -step))[: self.count]
        return [info.step in best for info in checkpoints]


def newest_and_best(newest: int | None, best: int, losses: dict[int, float]) -> Any:
    """A policy for Orbax: the newest checkpoints stay (None: all), and the best of the others' time."""
    return AnyPreservationPolicy([LatestN(newest), BestByLoss(best, losses)])
